"""What the tests of the feature cache share."""

import torch

TEXT = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))


def noise(seed=0, batch=2, height=16, width=16):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def kinds(report):
    """F for each full call of the latest generation, c for each cached one, s for each that was skipped."""
    return "".join({"full": "F", "cached": "c", "skipped": "s"}[step.kind] for step in report.steps)


def forwards(pipe):
    """Names of the UNet's modules with a forward of their own."""
    return [name for name, module in pipe.unet.named_modules() if "forward" in module.__dict__]


def denoise(unet, timesteps, seed=0, text=TEXT):
    """A loop of the caller's own; yields the latents after each step."""
    sample = noise(seed)
    for timestep in timesteps:
        with torch.no_grad():
            sample = sample - 0.1 * unet(sample, timestep, text).sample
        yield sample


def compile_unet(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)


def compile_in_place(pipe):
    pipe.unet.compile(backend="eager")


def compile_blocks(pipe):
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
