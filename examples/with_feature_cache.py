"""Merging and a feature cache together: by hand, then by a preset; pictures and what was done at which step."""

import torch

from tomesd_plus import feature_cache, load_tiny_pipeline, preset, token_merging

PROMPT = "a large ladybug on a pink gradient background"

pipe = load_tiny_pipeline()  # or any Stable Diffusion 1.x, 2.x or XL pipeline


def picture(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    image = pipe(PROMPT, num_inference_steps=25, guidance_scale=3, generator=generator).images[0]
    image.resize((256, 256)).save(f"{name}.png")


picture("untouched")

# The whole UNet at every third step, half its tokens merged; three quarters where only the outer layers run.
with feature_cache(pipe, interval=3) as cache, token_merging(pipe, ratio=0.5, cached_ratio=0.75) as merging:
    picture("cache-and-merging")
print(cache)
print([step.removed for step in merging.steps])

for name in ("quality", "balanced", "fast"):
    with preset(pipe, name):
        picture(name)
