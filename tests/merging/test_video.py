"""AnimateDiff: frames are a batch to spatial attention, and tokens to the motion modules, which are left alone."""

import pytest
import torch
from conftest import WIDTH, make_pipeline, make_unet
from diffusers import AnimateDiffPipeline, MotionAdapter, UNetMotionModel

from tomesd_plus import ToMeProcessor, apply_feature_cache, apply_token_merging, merging_report, remove_token_merging


@pytest.fixture
def video():
    torch.manual_seed(0)
    adapter = MotionAdapter(block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=2,
                            motion_norm_num_groups=8, motion_mid_block_layers_per_block=1)  # fmt: skip
    parts = make_pipeline("sd").components | {"motion_adapter": adapter}
    del parts["safety_checker"]
    pipe = AnimateDiffPipeline(**parts | {"unet": make_unet(cross_attention_dim=WIDTH), "image_encoder": None})
    for name, parameter in pipe.unet.named_parameters():
        if "motion_modules" in name and "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # zero as built
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames(pipe, seed=0, **options):
    call = {"num_frames": 4, "height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 5.0} | options
    return pipe("a cat", generator=torch.Generator().manual_seed(seed), output_type="pt", **call).frames


@pytest.mark.parametrize(
    "options",
    [{}, {"layers": "block"}, {"layers": ["self_attention", "mlp"]}, {"metric": "block_input", "full_steps": 2}],
)
def test_spatial_attention_is_merged(video, options):
    assert isinstance(video.unet, UNetMotionModel)
    plain = frames(video)
    report = apply_token_merging(video, ratio=0.0, **options)
    assert torch.equal(frames(video), plain) and not report.merged
    remove_token_merging(video)
    report = apply_token_merging(video, ratio=0.5, **options)
    merged = frames(video)
    assert not torch.equal(merged, plain) and torch.equal(frames(video), merged)
    assert report.removed[1] > 0
    over_frames = [layer for layer in report.layers if "motion_modules" in layer.name]
    assert over_frames and {layer.reason for layer in over_frames} == {"its tokens are frames"}
    assert not any(layer.removed for layer in over_frames)
    remove_token_merging(video)
    assert torch.equal(frames(video), plain)


@pytest.mark.parametrize("count", [4, 16])  # 16 frames are as many tokens as a level of 4 × 4 has
def test_a_processor_set_by_itself_leaves_frames_alone(video, count):
    plain = frames(video, num_frames=count)
    video.unet.set_attn_processor(ToMeProcessor(ratio=0.5, max_downsample=8))
    merged = frames(video, num_frames=count)
    assert not torch.equal(merged, plain) and torch.equal(frames(video, num_frames=count), merged)
    layers = (
        video.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor.attachment.record.value.layers
    )
    assert not any(layer.removed for name, layer in layers.items() if "motion_modules" in name)
    remove_token_merging(video)
    assert torch.equal(frames(video, num_frames=count), plain)


def test_a_cache_is_refused_in_words(video):
    with pytest.raises(TypeError, match="expected a UNet of Stable Diffusion"):
        apply_feature_cache(video, interval=2)


def test_the_first_call_of_a_processor_set_by_itself_is_of_the_same_batch(video):
    video.unet.set_attn_processor(ToMeProcessor(ratio=0.5, full_steps=3))
    first = frames(video, num_inference_steps=6)
    assert [bool(step.removed) for step in merging_report(video).steps] == [False, True, True] * 2
    assert torch.equal(frames(video, num_inference_steps=6), first)
