"""Names that help texts list. What they name takes seconds to import; a test compares them with it."""

PRESETS = "quality", "balanced", "fast"
SHAPES = "sd15", "sd21", "sdxl", "tiny"
SUITES = "cpu", "gpu", "smoke"
