"""Merge tokens with one line, on the embedded pipeline or a model of your own: examples/quickstart.py [MODEL]."""

import sys

import torch
from diffusers import AutoPipelineForText2Image

from tomesd_plus import ToMeProcessor, load_tiny_pipeline

model = sys.argv[1] if len(sys.argv) > 1 else None
pipe = AutoPipelineForText2Image.from_pretrained(model, use_safetensors=True) if model else load_tiny_pipeline()
pipe.unet.set_attn_processor(ToMeProcessor())  # more merging at noisy steps, half of the tokens on average

image = pipe("a large dog on a blue background", generator=torch.Generator().manual_seed(0)).images[0]
image.save("quickstart.png")
