"""Names that help texts list. What they name takes seconds to import; a test compares them with it."""

DOWNSAMPLES = 1, 2, 4, 8
PRESETS = "quality", "balanced", "fast"
SHAPES = "sd15", "sd21", "sdxl", "pixart", "sd3", "flux-blocks", "tiny"
METHODS = "merging", "evit", "ats"
TOWERS = "vit-b16", "vit-l16", "clip-b32", "clip-l14", "dinov2-s", "vit-tiny"
SUITES = "cpu", "gpu", "vision", "smoke"
