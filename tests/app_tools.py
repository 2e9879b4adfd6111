"""What the tests of the app's backend share."""

from conftest import hooks

from gradio_app.settings import Picture
from tomesd_plus import ToMeProcessor

STEPS = 3


def picture(**options):
    fields = {"prompt": "a cat", "negative_prompt": "", "seed": 0, "steps": STEPS, "guidance_scale": 3.0}
    return Picture(**(fields | {"width": 32, "height": 32} | options))


def untouched(pipe):
    return not hooks(pipe) and not any(isinstance(p, ToMeProcessor) for p in pipe.unet.attn_processors.values())
