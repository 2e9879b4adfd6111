"""Token merging and a feature cache as algorithms of Pruna: smash, save, load."""

import torch
from pruna import PrunaModel, SmashConfig, smash

import tomesd_plus.integrations.pruna  # noqa: F401  # adds tome_sd, tome_cache and tome_vision
from tomesd_plus import load_tiny_pipeline, merging_report

PROMPT = "a large ladybug on a pink gradient background"


def picture(pipe: object, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    image = pipe(PROMPT, num_inference_steps=25, guidance_scale=3, generator=generator).images[0]  # type: ignore[operator]
    image.resize((256, 256)).save(f"{name}.png")


pipe = load_tiny_pipeline()  # or any Stable Diffusion 1.x, 2.x or XL pipeline
picture(pipe, "untouched")

config = SmashConfig(
    {
        "tome_sd": {"method": "merge", "reduction_ratio": 0.5, "adaptive": False},
        "tome_cache": {"interval": 2, "forecast": 1.0},
    },
    device="cpu",
)
smash(pipe, config).save_pretrained("smashed")
smashed = PrunaModel.from_pretrained("smashed")  # merges and caches again
picture(smashed, "smashed")
print(merging_report(smashed.model))
