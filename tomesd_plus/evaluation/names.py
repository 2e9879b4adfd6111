"""Names that commands and functions take; the first three where they otherwise take a path or a hub id."""

TINY = "tiny"  # the embedded pipeline, or as an extractor the embedded CLIP
EMBEDDED = "embedded"  # the package's held-out captions, or its reference statistics
INCEPTION = "inception"  # torch-fidelity's InceptionV3
DTYPES = "float32", "bfloat16", "float16"
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Short names of schedulers, and their classes in diffusers."""
KARRAS = "-karras"  # after a scheduler's name: Karras' noise levels
