"""Quantized weights beside merging and caching, on the embedded pipeline: examples/quantization.py [CAPTIONS].

Writes ``quantization.csv``: PSNR to the untouched float32 pictures, and to those of the same weights with nothing on;
a core's time for a picture; MiB of the UNet's weights. torchao's rows need it: ``pip install torchao``.
"""

import csv
import sys
from importlib.util import find_spec
from statistics import mean
from time import process_time
from typing import Any

import torch
from torch import Tensor

from tomesd_plus import apply_preset, apply_token_merging, load_tiny_pipeline
from tomesd_plus.metrics.fidelity import psnr
from tomesd_plus.tiny import held_out_captions

FLOAT, STORED, INT8 = "float32", "float8 storage (layerwise casting)", "int8 weights (torchao)"
WAYS = ("nothing", "merging 0.5", "quality", "balanced", "fast")


def made(weights: str, way: str, captions: list[str], steps: int) -> tuple[list[Tensor], float, float]:
    """Pictures, seconds for one, and MiB of the UNet's weights."""
    pipe: Any = load_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    if weights == STORED:
        pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    elif weights == INT8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(pipe.unet, Int8WeightOnlyConfig())
    size = sum(_bytes(parameter) for parameter in pipe.unet.parameters()) / 2**20
    if way.startswith("merging"):
        apply_token_merging(pipe, ratio=0.5)
    elif way != "nothing":
        apply_preset(pipe, way, force=True)
    pictures, start = [], process_time()
    for seed, caption in enumerate(captions):
        generator = torch.Generator().manual_seed(seed)
        options = {"num_inference_steps": steps, "guidance_scale": 3, "output_type": "pt", "generator": generator}
        pictures.append(pipe(caption, **options).images[0])
    return pictures, (process_time() - start) / len(captions), size


def _bytes(parameter: Any) -> int:
    parts = [getattr(parameter, name) for name in ("qdata", "scale") if hasattr(parameter, name)] or [parameter]
    return sum(part.numel() * part.element_size() for part in parts)


def main(count: int) -> None:
    captions, steps = held_out_captions()[:count], 20 if count > 1 else 10
    kinds = [FLOAT, STORED, *([INT8] if find_spec("torchao") else [])]
    untouched, _, _ = made(FLOAT, "nothing", captions, steps)
    with open("quantization.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["weights", "on", "PSNR dB to untouched float32", "PSNR dB to these weights untouched",
                        "s a picture", "MiB", "captions", "steps"])  # fmt: skip
        for weights in kinds:
            own: list[Tensor] = []
            for way in WAYS:
                pictures, seconds, size = made(weights, way, captions, steps)
                own = own or pictures
                errors = [f"{mean(map(float, map(psnr, pictures, others))):.1f}" for others in (untouched, own)]
                table.writerow([weights, way, *errors, f"{seconds:.2f}", f"{size:.1f}", count, steps])
                print(weights, way, *errors, f"{seconds:.2f} s", f"{size:.1f} MiB", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
