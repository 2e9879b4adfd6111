"""How far attention's output moves when image tokens are merged, by a proxy: no trained transformer is at hand.

``python examples/transformer_proxy.py CAPTIONS BLOCKS`` writes ``transformer-proxy.csv``; 1 caption and 3 blocks by
default. The tokens are real, the transformer is not: latents of the embedded pipeline's pictures under way, at five
noise levels, go through a transformer with random weights. Each attention layer is given the untouched model's input,
so that errors do not add up, and what is told is the length of the difference of its output (the image's tokens) over
the length of the output, on average over layers, noise levels and captions. It tells ways to merge apart. It tells
nothing of pictures: in trained transformers attention is sharper and tokens differ more from block to block.
"""

import csv
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from tomesd_plus import __version__, apply_token_merging, load_tiny_pipeline, remove_token_merging
from tomesd_plus.evaluation.generation.devices import device_name
from tomesd_plus.host.transformers import blocks_of
from tomesd_plus.merging import transformers
from tomesd_plus.tiny import held_out_captions

captions, blocks = map(int, sys.argv[1:] or ("1", "3"))
STEPS, TAKEN = 25, (1, 6, 12, 18, 23)
STAGE = "blocks per stage"  # not an option: the constant behind plan_per="stage"
SETTINGS: list[dict[str, Any]] = [
    {},
    {"plan_per": "block"},
    *({STAGE: count} for count in (2, 4, 8)),
    {"plan_per": "level"},
    {"plan_per": "block", "proportional_attention": False},
    {"plan_per": "block", "metric": "block_input"},
    {"plan_per": "block", "metric": "keys"},
    {"plan_per": "block", "destinations": "fixed"},
    {"plan_per": "block", "window": None},
    {"plan_per": "block", "mode": "prune"},
    {"plan_per": "block", "sides": "keys_values"},
]


def latents_under_way() -> list[tuple[Tensor, float]]:
    """Latents (1, 4, height, width) with their timesteps."""
    pipe = load_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    found: list[tuple[Tensor, float]] = []

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step in TAKEN:
            found.append((tensors["latents"].clone(), float(timestep)))
        return tensors

    for seed, caption in enumerate(held_out_captions()[:captions]):
        generator = torch.Generator().manual_seed(seed)
        pipe(caption, num_inference_steps=STEPS, generator=generator, callback_on_step_end=keep, output_type="latent")
    return found


def make(family: str) -> Any:
    """A transformer with random weights, a token for each latent."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "sample_size": 16, "patch_size": 1, "in_channels": 4, "num_layers": blocks, "num_attention_heads": 6,
        "attention_head_dim": 64,
    }  # fmt: skip
    if family == "pixart":
        own = {"cross_attention_dim": 384, "caption_channels": 64, "use_additional_conditions": False}
        return PixArtTransformer2DModel(**common, **own).eval()
    own = {"joint_attention_dim": 64, "caption_projection_dim": 384, "pooled_projection_dim": 64}
    return SD3Transformer2DModel(**common, **own, out_channels=4, qk_norm="rms_norm").eval()


def run(model: nn.Module, latents: Tensor, timestep: float) -> None:
    """Call it with a prompt of random numbers."""
    generator = torch.Generator().manual_seed(0)
    more: dict[str, Any] = {"encoder_hidden_states": torch.randn(1, 16, 64, generator=generator)}
    if isinstance(model, SD3Transformer2DModel):
        more["pooled_projections"] = torch.randn(1, 64, generator=generator)
    model(hidden_states=latents, timestep=torch.tensor([timestep]), **more)


class Forced:
    """Gives each attention layer the untouched model's input, and passes the untouched output on."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
        self.errors: list[float] = []
        self.forcing = False

    def before(self, layer: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.calls[layer][:2] if self.forcing else None

    def after(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self.forcing:
            self.calls[layer] = args, kwargs, output
            return None
        untouched = self.calls[layer][2]
        image, expected = (each[0] if isinstance(each, tuple) else each for each in (output, untouched))
        self.errors.append(float((image - expected).norm() / expected.norm()))
        return untouched


about = [__version__, torch.__version__, diffusers.__version__, device_name(torch.device("cpu"))]
about += [datetime.now(UTC).date().isoformat()]
taken = latents_under_way()
rows = []
for family in ("pixart", "sd3"):
    model, forced = make(family), Forced()
    for block in blocks_of(model).values():
        attention: Any = block.attn1 if family == "pixart" else block.attn
        attention.register_forward_pre_hook(forced.before, with_kwargs=True)
        attention.register_forward_hook(forced.after, with_kwargs=True)
    untouched = []
    with torch.no_grad():
        for latents, timestep in taken:
            forced.calls = {}
            run(model, latents, timestep)
            untouched.append(forced.calls)
    forced.forcing = True
    for setting in SETTINGS:
        options = {name: value for name, value in setting.items() if name != STAGE}
        forced.errors.clear()
        shared = setting.get(STAGE, transformers.BLOCKS_PER_STAGE)
        with torch.no_grad(), patch.object(transformers, "BLOCKS_PER_STAGE", shared):
            apply_token_merging(model, 0.5, **options)
            for forced.calls, (latents, timestep) in zip(untouched, taken, strict=True):
                run(model, latents, timestep)
            remove_token_merging(model)
        name = ", ".join(f"{option} {value}" for option, value in setting.items()) or "default"
        low, middle, high = statistics.quantiles(forced.errors, method="inclusive")
        spread = [f"{figure:.4f}" for figure in (statistics.fmean(forced.errors), low, middle, high)]
        rows.append([family, name, *spread, len(forced.errors), *about])
with Path("transformer-proxy.csv").open("w", newline="", encoding="utf-8") as file:
    table = csv.writer(file, lineterminator="\n")
    names = ["family", "setting", "relative error", "lower quartile", "median", "upper quartile", "layers"]
    table.writerow([*names, "tomesd_plus", "torch", "diffusers", "device", "date"])
    table.writerows(rows)
