"""Other guidance, other loops: what steers or shortens a generation, and videos."""

from functools import partial

import torch
from conftest import GUIDANCE_SWITCHED_OFF, WIDTH, make_pipeline, make_unet
from diffusers import (
    AnimateDiffPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LEditsPPPipelineStableDiffusion,
    MotionAdapter,
    StableDiffusionGLIGENPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionSAGPipeline,
    StableDiffusionXLPAGPipeline,
    TextToVideoZeroPipeline,
)
from PIL import Image
from pipeline_tools import Row, cells, check, draw, of, slow
from test_pipelines_text_to_image import sdxl_unet


def gligen():
    unet = make_unet(attention_type="gated", cross_attention_dim=WIDTH)
    for name, parameter in unet.named_parameters():
        if "alpha" in name:
            torch.nn.init.constant_(parameter, 0.5)  # zero as built
    return of(StableDiffusionGLIGENPipeline, unet=unet)


def few_steps():
    pipe = make_pipeline("sd")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def euler():
    pipe = make_pipeline("sd")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def ledits():
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2,
                                            beta_schedule="scaled_linear")  # fmt: skip
    blocks = ["CrossAttnDownBlock2D"] * 3  # the pipeline reads attention maps at level 4
    unet = make_unet(block_out_channels=(16, 32, 32), down_block_types=blocks,
                     up_block_types=["CrossAttnUpBlock2D"] * 3)  # fmt: skip
    return of(LEditsPPPipelineStableDiffusion, scheduler=scheduler, unet=unet)


def edit(pipe):
    """Invert a picture, and edit it."""
    generator = torch.Generator().manual_seed(0)
    picture = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    pipe.invert(image=picture, num_inversion_steps=4, skip=0.25, generator=generator)
    return pipe(editing_prompt=["a cat"], edit_guidance_scale=5.0, edit_threshold=0.5, generator=generator,
                output_type="pt").images  # fmt: skip


def video_zero(pipe):
    frames = pipe("a cat", video_length=2, height=32, width=32, num_inference_steps=4, t0=1, t1=2,
                  generator=torch.Generator().manual_seed(0), output_type="np").images  # fmt: skip
    return torch.as_tensor(frames)


def animate_diff():
    torch.manual_seed(0)
    adapter = MotionAdapter(block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=2,
                            motion_norm_num_groups=8, motion_mid_block_layers_per_block=1)  # fmt: skip
    pipe = of(AnimateDiffPipeline, motion_adapter=adapter)
    for name, parameter in pipe.unet.named_parameters():
        if "motion_modules" in name and "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # zero as built
    return pipe


def frames(pipe):
    return pipe("a cat", num_frames=2, height=32, width=32, num_inference_steps=3,
                generator=torch.Generator().manual_seed(0), output_type="pt").frames  # fmt: skip


def interrupt(pipe, step, timestep, tensors):
    pipe._interrupt = step == 1
    return tensors


THREE = ("merging", "cache", "bare")

ROWS = [
    Row("PAG in the middle", lambda: of(StableDiffusionPAGPipeline), ways=THREE),
    Row("PAG where tokens are merged", lambda: of(StableDiffusionPAGPipeline, pag_applied_layers=["down_blocks.0"])),
    slow(Row("PAG (SDXL)", lambda: of(StableDiffusionXLPAGPipeline, "sdxl", unet=sdxl_unet()), level=4)),
    Row("SAG", lambda: of(StableDiffusionSAGPipeline), partial(draw, sag_scale=0.75),
        warns={"cache": "reads attention maps"}),
    Row("FreeU", lambda: make_pipeline("sd"), before=lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)),
    slow(Row("FreeU, later", lambda: make_pipeline("sd"), then=lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4))),
    Row("GLIGEN", gligen, partial(draw, gligen_phrases=["a cat"], gligen_boxes=[[0.1, 0.1, 0.7, 0.7]])),
    Row("Latent consistency model",
        lambda: of(LatentConsistencyModelPipeline, unet=make_unet(time_cond_proj_dim=8),
                   scheduler=LCMScheduler(beta_schedule="scaled_linear", clip_sample=False)), draw),
    slow(Row("Two steps", few_steps, partial(draw, num_inference_steps=2, guidance_scale=1.0))),
    slow(Row("One step", few_steps, partial(draw, num_inference_steps=1, guidance_scale=1.0),
             ways=("merging", "bare"))),
    Row("LEDITS++", ledits, edit, ways=THREE, partly=("cache",),  # the inversion is cached
        warns={"merging": "were replaced by", "cache": "reads attention maps",
               "bare": "ToMeProcessor was replaced by AttnProcessor. Use apply_token_merging"}),
    Row("Text2Video-Zero", lambda: of(TextToVideoZeroPipeline), video_zero, ways=THREE,
        warns={"merging": "were replaced by CrossFrameAttnProcessor2_0. The pipeline sets them for its calls",
               "bare": "its pipeline has replaced it by CrossFrameAttnProcessor2_0"}),
    Row("AnimateDiff", animate_diff, frames, ways=THREE,
        refuses={"cache": "expected a UNet of Stable Diffusion"}),
    Row("Guidance switched off by a callback", lambda: make_pipeline("sd"),
        partial(draw, **GUIDANCE_SWITCHED_OFF, num_inference_steps=4)),
    Row("Interrupted by a callback", lambda: make_pipeline("sd"),
        partial(draw, callback_on_step_end=interrupt, num_inference_steps=4)),
    slow(Row("Several pictures a prompt", lambda: make_pipeline("sd"), partial(draw, num_images_per_prompt=2))),
    slow(Row("Timesteps of one's own", euler, partial(draw, timesteps=[900, 500, 100], num_inference_steps=None))),
    slow(Row("Sigmas of one's own", euler, partial(draw, sigmas=[14.0, 5.0, 2.0, 0.5], num_inference_steps=None))),
]  # fmt: skip


@cells(ROWS)
def test_cell(row, way, record_property):
    check(row, way, record_property)
