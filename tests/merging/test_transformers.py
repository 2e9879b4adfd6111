"""Merging in PixArt, Stable Diffusion 3 and Flux, end to end on tiny random pipelines."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from diffusers import HunyuanDiT2DModel
from transformer_tools import FAMILIES, call, generate, make_pipeline, make_transformer

from tomesd_plus import (
    ConstantSchedule,
    LinearSchedule,
    ToMeConfig,
    ToMeProcessor,
    apply_token_merging,
    generation,
    merging_report,
    remove_token_merging,
    token_merging,
)

JOINT = ["sd3", "sd35", "flux"]


@pytest.fixture(params=FAMILIES)
def pipe(request):
    return make_pipeline(request.param)


def hooks(pipe):
    return [name for name, m in pipe.transformer.named_modules() if m._forward_hooks or m._forward_pre_hooks]


def test_ratio_zero_and_removal_are_bit_identical_and_merging_is_at_work(pipe):
    untouched = generate(pipe)
    processors = pipe.transformer.attn_processors
    with token_merging(pipe, ratio=0.0) as report:
        assert torch.equal(generate(pipe), untouched)
        assert not report.merged
    report = apply_token_merging(pipe, ratio=0.5)
    merged = generate(pipe)
    assert report.removed == {1: 0.5} and len(report.layers) >= 3
    assert not torch.equal(merged, untouched)
    assert torch.equal(generate(pipe), merged)
    remove_token_merging(pipe)
    assert torch.equal(generate(pipe), untouched)
    assert pipe.transformer.attn_processors == processors and not hooks(pipe)


def test_the_steps_are_those_of_the_schedule(pipe):
    report = apply_token_merging(pipe, LinearSchedule(0.7, 0.1))
    generate(pipe, num_inference_steps=4)
    noise = [step.noise_level for step in report.steps]
    assert [step.index for step in report.steps] == [0, 1, 2, 3]
    assert noise == sorted(noise, reverse=True) and noise[0] >= 0.99
    removed = [step.removed[1] for step in report.steps]
    assert removed == pytest.approx([0.1 + 0.6 * level for level in noise], abs=1 / 32)
    if hasattr(pipe.scheduler, "sigmas") and "Flow" in type(pipe.scheduler).__name__:
        assert noise == pytest.approx(pipe.scheduler.sigmas[:4].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    "options", [{"height": 48, "width": 32}, {"prompt": ["a cat", "a dog"]}, {"guidance_scale": 1.0}]
)
def test_other_sizes_batches_and_guidance_leave_the_first_picture_as_it_was(pipe, options):
    report = apply_token_merging(pipe, ratio=0.5)
    first = generate(pipe)
    other = generate(pipe, **options)
    assert report.removed == {1: 0.5}
    assert torch.equal(generate(pipe, **options), other)
    assert torch.equal(generate(pipe), first)
    fresh = make_pipeline_like(pipe)
    apply_token_merging(fresh, ratio=0.5)
    assert torch.equal(generate(fresh, **options), other)


def make_pipeline_like(pipe):
    copied = copy.deepcopy(pipe)
    remove_token_merging(copied)
    return copied


@pytest.mark.parametrize("family", FAMILIES)
def test_grids_come_from_the_call_and_not_from_a_square_root(family):
    pipe = make_pipeline(family)
    report = apply_token_merging(pipe, ratio=0.5)
    height = 24 if family.startswith("pixart") else 40
    generate(pipe, height=height, width=104)  # the VAE halves a side, and so does a patch
    assert report.merge_map().shape == (height // 4, 26)
    assert report.removed == {1: 0.5}


@pytest.mark.parametrize("family", ["sd3", "sd35", "flux"])
def test_text_tokens_are_never_merged(family):
    model = make_transformer(family)
    seen = []
    for block in model.transformer_blocks:
        block.attn.add_k_proj.register_forward_hook(
            lambda layer, args, output: seen.append(("text", args[0].shape[1]))
        )
        block.attn.to_k.register_forward_hook(lambda layer, args, output: seen.append(("image", args[0].shape[1])))
    apply_token_merging(model, ratio=0.5)
    call(model, 8, 8)
    assert {count for kind, count in seen if kind == "text"} == {7}
    assert {count for kind, count in seen if kind == "image"} == {32}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {"sides": "keys_values"},
        {"sides": "queries"},
        {"mode": "prune"},
        {"metric": "keys"},
        {"metric": "block_input"},
        {"proportional_attention": False},
        {"destinations": "fixed", "plan_per": "level"},
        {"full_steps": 2, "plan_every": 2, "plan_per": "block"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_options_of_attention_merge_and_repeat(family, options):
    pipe = make_pipeline(family)
    untouched = generate(pipe)
    report = apply_token_merging(pipe, ratio=0.5, **options)
    merged = generate(pipe)
    assert report.merged and not torch.equal(merged, untouched)
    assert torch.equal(generate(pipe), merged)
    assert (merged - untouched).abs().max() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family, dtype):
    model = make_transformer(family).to(dtype)
    untouched = call(model, 8, 6, batch=2, dtype=dtype)
    report = apply_token_merging(model, ratio=0.5)
    merged = call(model, 8, 6, batch=2, dtype=dtype)
    assert report.merged and merged.dtype == dtype and merged.isfinite().all()
    assert not torch.equal(merged, untouched)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_merge_alike(family):
    pipe = make_pipeline(family)
    apply_token_merging(pipe, ratio=0.5)
    merged = generate(pipe)
    copied, loaded = copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe.transformer))
    assert torch.equal(generate(copied), merged)
    remove_token_merging(pipe)
    assert torch.equal(generate(copied), merged)
    pipe.transformer = loaded
    assert torch.equal(generate(pipe), merged)
    assert merging_report(pipe).removed == {1: 0.5}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_threads_share_a_model(family):
    model = make_transformer(family)
    apply_token_merging(model, LinearSchedule(0.7, 0.1), plan_every=2, layers="block", blocks_per_run=2)

    def denoise(rows):
        return [call(model, rows, 6, timestep=timestep) for timestep in (900.0, 600.0, 300.0)]

    sizes = [6, 8]
    expected = [denoise(rows) for rows in sizes]
    found = [[], []]

    def run(index):
        for _ in range(4):
            found[index].append(denoise(sizes[index]))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert len(found[index]) == 4
        for outputs in found[index]:
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected[index], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_failed_call_leaves_nothing_behind(family):
    pipe = make_pipeline(family)
    apply_token_merging(pipe, ratio=0.5)
    merged = generate(pipe)

    def fail(*_):
        raise RuntimeError("stop")

    handle = pipe.transformer.transformer_blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe)
    handle.remove()
    assert torch.equal(generate(pipe), merged)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_generation_can_be_said_to_begin(family):
    model = make_transformer(family)
    report = apply_token_merging(model, ConstantSchedule(0.5), plan_every=2)
    with generation(model):
        outputs = [call(model, 8, 8, timestep=t) for t in (100.0, 300.0, 500.0)]
    assert len(report.steps) == 3 and report.merged
    with generation(model):
        again = [call(model, 8, 8, timestep=t) for t in (100.0, 300.0, 500.0)]
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


def test_flux_with_true_guidance_calls_twice_a_step():
    pipe = make_pipeline("flux")
    report = apply_token_merging(pipe, ratio=0.5, plan_every=2)
    options = {"true_cfg_scale": 4.0, "negative_prompt": "a dog"}
    merged = generate(pipe, **options)
    assert [step.index for step in report.steps] == [0, 0, 1, 1, 2, 2]
    assert torch.equal(generate(pipe, **options), merged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flux_of_one_step_begins_a_generation_each_time(dtype):
    pipe = make_pipeline("flux").to(dtype)
    report = apply_token_merging(pipe, ratio=0.5)
    for _ in range(2):
        generate(pipe, num_inference_steps=1)
        assert [step.noise_level for step in report.steps] == [1.0]


def test_flux_without_a_pipeline_reads_its_timesteps():
    model = make_transformer("flux")
    report = apply_token_merging(model, LinearSchedule(0.7, 0.1))
    for timestep in (1000.0, 500.0, 250.0):
        call(model, 8, 8, batch=2, timestep=timestep)
    assert [step.noise_level for step in report.steps] == [1.0, 0.5, 0.25]


def test_flux_leaves_ids_that_are_no_grid_alone():
    model = make_transformer("flux")
    untouched = call(model, 8, 8)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    ids = torch.stack([y // 4, y % 4, x], dim=-1).flatten(0, 1)  # two pictures, as with a reference image
    plain = call(model, 8, 8, img_ids=ids)
    report = apply_token_merging(model, ratio=0.5)
    with pytest.warns(UserWarning, match="position ids of its 64 tokens"):
        assert torch.equal(call(model, 8, 8, img_ids=ids), plain)
        assert not report.merged
    assert "not those of one grid" in report.layers[0].reason
    assert not torch.equal(call(model, 8, 8), untouched) and report.merged


@pytest.mark.parametrize("family", FAMILIES)
def test_applied_twice_is_refused_and_nothing_to_remove_is_said(family):
    pipe = make_pipeline(family)
    with pytest.warns(UserWarning, match="nothing to remove"):
        remove_token_merging(pipe)
    apply_token_merging(pipe, ratio=0.5)
    with pytest.raises(ValueError, match="already applied to transformer"):
        apply_token_merging(pipe, ratio=0.5)


def test_other_transformers_are_refused_in_words():
    model = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, num_layers=1,
        hidden_size=16, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=4,
        text_len=4, text_len_t5=4,
    )  # fmt: skip
    with pytest.raises(TypeError, match="not in a HunyuanDiT2DModel"):
        apply_token_merging(model, ratio=0.5)


def test_a_bare_processor_is_refused_in_words():
    model = make_transformer("pixart-alpha")
    model.set_attn_processor(ToMeProcessor(ratio=0.5))
    with pytest.raises(TypeError, match="use apply_token_merging for this PixArtTransformer2DModel"):
        call(model, 8, 8)


def test_replaced_processors_are_noticed():
    pipe = make_pipeline("sd3")
    report = apply_token_merging(pipe, ratio=0.5)
    merged = generate(pipe)
    pipe.transformer.fuse_qkv_projections()
    with pytest.warns(UserWarning, match="replaced by FusedJointAttnProcessor2_0"):
        generate(pipe)
    assert not report.merged
    pipe.transformer.unfuse_qkv_projections()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(pipe)
    remove_token_merging(pipe)
    pipe = make_pipeline("sd3")
    apply_token_merging(pipe, ratio=0.5)
    assert torch.equal(generate(pipe), merged)


@pytest.mark.parametrize("family", JOINT)
def test_cross_attention_alone_is_nothing_in_joint_attention(family):
    with pytest.raises(ValueError, match="attend to text and image at once"):
        apply_token_merging(make_transformer(family), ToMeConfig(ratio=0.5, layers="cross_attention"))
