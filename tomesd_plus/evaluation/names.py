"""Names that commands and functions accept in place of a path or a hub id."""

TINY = "tiny"  # the embedded pipeline, or as an extractor the embedded CLIP
EMBEDDED = "embedded"  # the package's held-out captions, or its reference statistics
INCEPTION = "inception"  # torch-fidelity's InceptionV3
