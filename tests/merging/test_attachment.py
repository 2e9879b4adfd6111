"""Models that are changed while merging is attached to them."""

import copy
import gc
import threading
import warnings

import pytest
import torch
from conftest import INPUTS, generate, hooks, make_pipeline, make_unet
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.modules.module import register_module_forward_pre_hook

from tomesd_plus import (
    StepsSchedule,
    ToMeProcessor,
    apply_feature_cache,
    apply_token_merging,
    remove_token_merging,
    tomesd,
)


def test_one_controlnet_used_twice_is_wrapped_once():
    from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

    pipe = make_pipeline("controlnet")
    pipe.controlnet = MultiControlNetModel([pipe.controlnet, pipe.controlnet])
    apply_token_merging(pipe, ratio=0.5)
    processors = [
        m.processor for m in pipe.controlnet.modules() if isinstance(getattr(m, "processor", None), ToMeProcessor)
    ]
    assert processors and not any(isinstance(p.inner, ToMeProcessor) for p in processors)


def test_removing_after_the_processors_were_replaced(pipe):
    apply_token_merging(pipe, ratio=0.5)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    remove_token_merging(pipe)
    assert not hooks(pipe)


def test_processors_that_the_host_makes_anew_keep_the_configuration(pipe):
    """As loading an IP-Adapter does: ``cls()`` for every self-attention layer."""
    report = apply_token_merging(pipe, ratio=0.25)
    first = generate(pipe)
    for module in pipe.unet.modules():
        if isinstance(getattr(module, "processor", None), ToMeProcessor):
            module.set_processor(type(module.processor)())
    assert torch.equal(generate(pipe), first) and report.removed[1] == 0.25
    assert len(report.steps) == 4


def test_a_compiled_model_is_freed_of_its_hooks_at_once(pipe):
    unet = pipe.unet
    apply_token_merging(pipe, ratio=0.5)
    pipe.unet = torch.compile(unet, backend="eager")
    remove_token_merging(pipe)
    assert not unet._forward_pre_hooks and not unet._forward_hooks


def test_processors_merge_again_after_a_temporary_replacement(pipe):
    report = apply_token_merging(pipe, ratio=0.5)
    merged = generate(pipe)
    ours = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with pytest.warns(UserWarning, match="were replaced by AttnProcessor2_0"):
        plain = generate(pipe)
    assert not torch.equal(plain, merged) and not report.merged
    pipe.unet.set_attn_processor(dict(ours))
    assert torch.equal(generate(pipe), merged) and report.merged  # from the first picture on
    assert torch.equal(generate(pipe), merged)


def test_no_warning_for_a_step_that_ran_no_layer_of_the_level():
    pipe = make_pipeline("sdxl")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        apply_feature_cache(pipe, interval=2)
        report = apply_token_merging(pipe, ratio={2: StepsSchedule((0.0, 0.5))})
        generate(pipe, num_inference_steps=10)
    assert report.merged


def test_a_processor_that_takes_anothers_place_keeps_its_own_outputs(pipe):
    for _ in range(2):
        pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5, full_steps=2))
        picture = generate(pipe)
    assert torch.equal(generate(pipe), picture)
    remove_token_merging(pipe)
    assert not [name for module in pipe.unet.modules() for name in vars(module) if "tomesd_plus" in name]


@pytest.mark.parametrize("before", ["merging", "drop-in"])
def test_applied_anew_after_processors_were_replaced_it_has_its_own_settings(pipe, before):
    if before == "merging":
        apply_token_merging(pipe, ratio=0.25)
    else:
        tomesd.apply_patch(pipe, ratio=0.25)
    generate(pipe)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    report = apply_token_merging(pipe, ratio=0.75)
    generate(pipe)
    assert report.removed[1] == 0.75


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_processor_on_another_model_says_so_and_merges_nothing(by_name, grad):
    processor, unets = ToMeProcessor(ratio=0.5), [make_unet(), make_unet()]
    for unet in unets:
        unet.set_attn_processor(processor)
    plain = make_unet()
    call = {"sample": INPUTS["sample"], "timestep": 700, "encoder_hidden_states": INPUTS["encoder_hidden_states"]}

    def run(unet):
        return (unet(**call) if by_name else unet(*call.values())).sample

    with torch.set_grad_enabled(grad):
        assert not torch.equal(run(unets[0]), run(plain))
        with pytest.warns(UserWarning, match="serves one model only"):
            assert torch.equal(run(unets[1]), run(plain))


def test_a_unet_that_hands_on_whatever_it_is_given_is_one_too():
    class Wrapped(UNet2DConditionModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    unet = make_unet()
    plain = unet(**INPUTS, timestep=700).sample
    unet.__class__ = Wrapped
    report = apply_token_merging(unet, ratio=0.5)
    assert not torch.equal(unet(**INPUTS, timestep=700).sample, plain) and report.merged
    with pytest.raises(TypeError, match="UNet"):
        apply_token_merging(make_pipeline("sd").vae, ratio=0.5)


@pytest.mark.parametrize("late", [True, False])
def test_two_threads_at_the_first_call_of_a_processor_set_by_itself(pipe, late):
    """Late: the second has begun its call, and runs its hooks when the first call is over."""
    expected = copy.deepcopy(pipe.unet)
    apply_token_merging(expected, ratio=0.5)
    with torch.no_grad():
        one = expected(**INPUTS, timestep=700).sample
    for _ in range(10):
        unet = copy.deepcopy(pipe.unet)
        begun, over, made = threading.Event(), threading.Event(), []

        def wait(module, args, unet=unet, begun=begun, over=over):
            if module is unet and threading.current_thread().name == "second":
                begun.set()
                assert not late or over.wait(60)

        def run(unet=unet, over=over, made=made):
            with torch.no_grad():
                made.append(unet(**INPUTS, timestep=700).sample)
            over.set()

        handle = register_module_forward_pre_hook(wait)
        unet.set_attn_processor(ToMeProcessor(ratio=0.5))
        threads = [threading.Thread(target=run, name=name) for name in ("second", "first")]
        threads[0].start()
        assert begun.wait(60)
        threads[1].start()
        for thread in threads:
            thread.join()
        handle.remove()
        assert [torch.equal(each, one) for each in made] == [True, True]
        remove_token_merging(unet)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in unet.modules())


@pytest.mark.parametrize("options", [{"metric": "block_input"}, {"layers": "block", "full_steps": 2}, {"ratio": 0.3}])
def test_training_with_checkpointing_keeps_nothing_from_step_to_step(options):
    unet = make_unet().train()
    unet.enable_gradient_checkpointing()
    apply_token_merging(unet, **options)
    counts = []
    for timestep in (900, 700, 500, 300, 600, 100):
        unet(**INPUTS, timestep=timestep).sample.mean().backward()
        gc.collect()
        counts.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))
    assert len(set(counts[2:])) <= 2  # full steps and those between
    assert max(counts[2:]) - min(counts[2:]) < 40 and counts[5] <= max(counts[2:4])
