"""Find what to run at which step on this model, solver and number of steps, keep it in a file, and use it."""

import torch
from diffusers import DPMSolverMultistepScheduler

from tomesd_plus import load_tiny_pipeline, preset, tune
from tomesd_plus.tiny import held_out_captions

pipe = load_tiny_pipeline()  # or any pipeline of your own, as you call it
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
call = {"num_inference_steps": 20, "guidance_scale": 3.0}

best = tune(pipe, held_out_captions()[:4], speedup=2.5, max_generations=12, **call)
best.save("tuned.json")
print(best.description, best.measured)


def picture(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    image = pipe("a large ladybug on a pink gradient background", generator=generator, **call).images[0]
    image.resize((256, 256)).save(f"{name}.png")


picture("untouched")
with preset(pipe, "tuned.json") as report:
    picture("tuned")
print(report)
