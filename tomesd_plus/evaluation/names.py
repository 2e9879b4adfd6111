"""Names that commands and functions take; the first three where they otherwise take a path or a hub id."""

TINY = "tiny"  # the embedded pipeline, or as an extractor the embedded CLIP
EMBEDDED = "embedded"  # the package's held-out captions, or its reference statistics
INCEPTION = "inception"  # torch-fidelity's InceptionV3
DTYPES = "float32", "bfloat16", "float16"
