"""Names with a meaning of their own, where a command or function otherwise takes a path or a hub id."""

TINY = "tiny"  # the embedded pipeline; among extractors the embedded CLIP
EMBEDDED = "embedded"  # the package's held-out captions, or its reference statistics
INCEPTION = "inception"  # torch-fidelity's InceptionV3
