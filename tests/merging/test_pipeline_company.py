"""Merging beside what else is done to a pipeline: half precision, copies, saving, offloading."""

import copy
import pickle

import accelerate
import pytest
import torch
from conftest import generate, make_pipeline, saved_and_loaded

from tomesd_plus import ToMeProcessor, apply_token_merging, remove_token_merging, token_merging


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pipe, dtype):
    pipe.to(dtype)
    report = apply_token_merging(pipe, ratio=0.5)
    assert generate(pipe).isfinite().all() and report.merged


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
@pytest.mark.parametrize("bare", [True, False])
def test_copies_merge_on_their_own(make_copy, bare):
    pipe = make_pipeline("sd")
    if bare:
        pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5))
    else:
        apply_token_merging(pipe, ratio=0.5)
    twin = make_pipeline("sd")
    twin.unet = make_copy(pipe.unet)  # before any call
    later = make_pipeline("sd")
    first = generate(pipe)
    later.unet = make_copy(pipe.unet)
    assert torch.equal(generate(twin), first) and torch.equal(generate(later), first)
    plain = generate(make_pipeline("sd"))
    assert not torch.equal(first, plain)
    remove_token_merging(pipe)
    assert torch.equal(generate(pipe), plain)
    assert torch.equal(generate(twin), first) and torch.equal(generate(later), first)


def test_saving_and_loading_a_merging_pipeline(pipe, tmp_path):
    plain = generate(pipe)
    apply_token_merging(pipe, ratio=0.5)
    assert not torch.equal(generate(pipe), plain)
    assert torch.equal(generate(saved_and_loaded(pipe, tmp_path)), plain)


@pytest.mark.parametrize("merging_comes_first", [True, False])
def test_the_hosts_offloading(pipe, merging_comes_first):
    with token_merging(pipe, ratio=0.5, layers=["self_attention", "mlp"], full_steps=3):
        expected = generate(pipe)
    if merging_comes_first:
        report = apply_token_merging(pipe, ratio=0.5, layers=["self_attention", "mlp"], full_steps=3)
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        accelerate.cpu_offload(pipe.unet, execution_device="cpu")  # as sequential offloading does
        report = apply_token_merging(pipe, ratio=0.5, layers=["self_attention", "mlp"], full_steps=3)
    for _ in range(2):  # the host offloads anew after each call
        assert torch.equal(generate(pipe), expected) and report.merged
