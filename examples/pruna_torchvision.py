"""Lets Pruna be imported beside a CPU build of torch: the torchvision of package indexes is built for CUDA's.

Its operators then cannot be loaded, and what of it Pruna imports declares fakes for two of them, which nothing here
calls: declaring the two is enough. Import this before Pruna. A torchvision that fits torch needs none of it.
"""

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
