"""Forwards of ours are taken off wherever a host has put them."""

import gc

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from conftest import generate
from diffusers.hooks import HookRegistry, ModelHook

from tomesd_plus import apply_feature_cache, remove_feature_cache
from tomesd_plus.caching.calls import SkippableCall
from tomesd_plus.caching.layers import SkippableForward


class Counting(ModelHook):
    """Replaces forward, as group offloading of a layer does."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def new_forward(self, module, *args, **kwargs):
        self.calls += 1
        return self.fn_ref.original_forward(*args, **kwargs)


def in_registry(layers, name="counting"):
    for layer in layers:
        HookRegistry.check_if_exists_or_initialize(layer).register_hook(Counting(), name)


def by_accelerate(layers):
    for layer in layers:
        add_hook_to_module(layer, AccelerateHook(), append=True)


WRAPPERS = {
    "registry": in_registry,
    "registry, twice": lambda layers: (in_registry(layers), in_registry(layers, "another")),
    "accelerate": by_accelerate,
    "both": lambda layers: (by_accelerate(layers), in_registry(layers)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("when", ["before the cache", "after it", "before and after"])
def test_nothing_of_ours_stays_in_a_hosts_chain(pipe, wrapper, when):
    unet = pipe.unet
    layers = [unet.mid_block, *unet.up_blocks, *unet.down_blocks]
    plain = generate(pipe)
    expected = None
    if when != "before the cache":
        apply_feature_cache(pipe, interval=2)
        expected = generate(pipe)
        if when == "before and after":
            remove_feature_cache(pipe)
    WRAPPERS[wrapper](layers)
    if when != "after it":
        apply_feature_cache(pipe, interval=2)
    cached = generate(pipe)
    assert not torch.equal(cached, plain)
    assert expected is None or torch.equal(cached, expected)
    remove_feature_cache(pipe)
    gc.collect()
    held = [each for each in gc.get_objects() if isinstance(each, SkippableForward)]
    assert not [each for each in held if any(each.layer is module for module in unet.modules())]
    assert torch.equal(generate(pipe), plain)
    for layer in layers:  # what the host removes later does not bring it back
        remove_hook_from_module(layer)
    assert torch.equal(generate(pipe), plain)


NEEDS_A_GPU = int(diffusers.__version__.split(".")[1]) < 36 and torch.accelerator.current_accelerator() is None


@pytest.mark.skipif(NEEDS_A_GPU, reason="group offloading of diffusers 0.35 fails on a machine without a GPU")
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("branch", [0, "nothing"])
@pytest.mark.parametrize("cache_first", [True, False])
def test_group_offloading(pipe, kind, branch, cache_first):
    """It keeps the forwards that it finds in its own chain."""
    plain, device = generate(pipe), torch.device("cpu")
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}

    def offload():
        pipe.unet.enable_group_offload(device, device, offload_type=kind, **options)

    if cache_first:
        apply_feature_cache(pipe, interval=2, branch=branch)
        offload()
    else:
        offload()
        apply_feature_cache(pipe, interval=2, branch=branch)
    assert not torch.equal(generate(pipe), plain)
    remove_feature_cache(pipe)
    gc.collect()
    ours = (SkippableForward, SkippableCall)
    held = [each for each in gc.get_objects() if isinstance(each, ours)]
    modules = set(pipe.unet.modules())
    assert not [each for each in held if getattr(each, "layer", getattr(each, "model", None)) in modules]
    assert torch.equal(generate(pipe), plain)
