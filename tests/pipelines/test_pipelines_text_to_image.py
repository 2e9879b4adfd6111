"""Text to image: every way on every family."""

import pytest
from conftest import WIDTH, make_pipeline, make_unet
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from pipeline_tools import WAYS, Row, cells, check, of

ALL = tuple(way for way in WAYS if way != "skipping")  # which is of any denoiser


def sd2():
    """As Stable Diffusion 2.1: linear projections, and the velocity is predicted."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
                              prediction_type="v_prediction")  # fmt: skip
    unet = make_unet(use_linear_projection=True, attention_head_dim=(2, 4))
    return of(StableDiffusionPipeline, unet=unet, scheduler=scheduler)


def sdxl_unet(**overrides):
    """Self-attention at levels 2 and 4, as in SDXL."""
    blocks = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    options = dict(
        block_out_channels=(16, 32, 32), down_block_types=blocks,
        up_block_types=[block.replace("Down", "Up") for block in reversed(blocks)],
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH, transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
    )  # fmt: skip
    return make_unet(**options | overrides)


ROWS = [
    Row("SD 1.x", lambda: make_pipeline("sd"), ways=ALL, fast=ALL),
    Row("SD 2.x", sd2, ways=ALL, fast=ALL),
    Row("SDXL", lambda: of(StableDiffusionXLPipeline, "sdxl", unet=sdxl_unet()), ways=ALL, fast=ALL, level=4),
]


@cells(ROWS)
def test_cell(row, way, record_property):
    check(row, way, record_property)


@pytest.mark.parametrize("way", [way for way in ALL if way != "cache"])
def test_sdxl_is_merged_at_both_its_levels(way):
    from pipeline_tools import draw

    from tomesd_plus import merging_report

    pipe = of(StableDiffusionXLPipeline, "sdxl", unet=sdxl_unet())
    WAYS[way].on(pipe, 4, 0.5)
    draw(pipe)
    removed = merging_report(pipe).removed
    assert removed[2] > 0 and (removed[4] > 0 or way == "preset")
