"""What was asked for and does not happen is said, once, and again when it stops happening later."""

import warnings

import pytest
import torch
from conftest import INPUTS, generate, make_pipeline, make_unet
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
from pipeline_tools import of

from tomesd_plus import ToMeProcessor, apply_feature_cache, apply_token_merging, feature_cache, tomesd
from tomesd_plus.caching.generation import WhyFull
from tomesd_plus.caching.verdict import ASKED_FOR, MENDS


def said(run):
    """What we say while something runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [text for text in (str(each.message) for each in caught) if text.startswith(("Token merging", "A feature"))]


@pytest.mark.parametrize(
    "switch",
    [
        lambda pipe: apply_token_merging(pipe, ratio=0.5),
        lambda pipe: pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5)),
        lambda pipe: tomesd.apply_patch(pipe, ratio=0.5),
    ],
    ids=["apply", "bare", "drop-in"],
)
def test_sdxl_at_level_1_is_told_once_at_the_last_step(switch):
    pipe, messages = make_pipeline("sdxl"), []
    switch(pipe)
    after = []

    def look(pipe, step, timestep, tensors):
        after.append(len(messages))
        return tensors

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest, **more: messages.append(str(message))
        generate(pipe, callback_on_step_end=look)
        assert [each for each in messages if "merged nothing" in each and "max_downsample=2" in each] == messages
        assert after == [0, 0, 0, 1]
        generate(pipe)
    assert len(messages) == 1


def test_what_stops_later_is_told_again_each_time():
    unet = make_unet(attention_type="gated")
    report = apply_token_merging(unet, ratio=0.5, layers="block")
    gligen = {"boxes": torch.rand(2, 3, 4), "positive_embeddings": torch.randn(2, 3, 16), "masks": torch.ones(2, 3)}

    def run(*pictures):
        with torch.no_grad():
            for places in pictures:
                for timestep in (900, 500):
                    unet(
                        **INPUTS,
                        timestep=timestep,
                        **({"cross_attention_kwargs": {"gligen": gligen}} if places else {}),
                    )

    assert said(lambda: run(False, True)) == []
    for _ in range(2):
        assert len(said(lambda: run(True, True, False, True, False))) == 2
    assert report.merged


def test_the_report_tells_when_it_is_read():
    unet = make_unet()
    report = apply_token_merging(unet, ratio=0.5, cell_size=(40, 40))
    with torch.no_grad():
        unet(**INPUTS, timestep=500)
    with pytest.warns(UserWarning, match="no cell fits"):
        assert not report.merged
    assert said(lambda: str(report)) == []


def test_a_ratio_that_begins_late_is_nothing_to_tell_of(pipe):
    from tomesd_plus import StepsSchedule

    report = apply_token_merging(pipe, StepsSchedule((0.0, 0.0, 0.0, 0.5)))
    assert said(lambda: generate(pipe)) == [] and report.merged
    assert said(lambda: generate(pipe, num_inference_steps=1)) == []  # nothing was to be merged there


def test_a_cache_that_caches_nothing_is_told(pipe):
    report = apply_feature_cache(pipe, interval=4, threshold=1e-9)
    assert ["raise it" in each for each in said(lambda: (generate(pipe), generate(pipe)))] == [True]
    assert not report.cached


def test_a_cache_of_one_step_and_of_calls_by_themselves(pipe):
    apply_feature_cache(pipe, interval=3)
    (message,) = said(lambda: [generate(pipe, num_inference_steps=1) for _ in range(3)])
    assert "a generation of one step" in message
    assert said(lambda: generate(pipe)) == []  # cached

    unet = make_unet()
    apply_feature_cache(unet, interval=3)

    def alone():
        torch.manual_seed(0)
        with torch.no_grad():
            for timestep in (100, 300, 500, 700):
                unet(torch.randn(1, 4, 16, 16), timestep, torch.randn(1, 7, 16))

    (message,) = said(alone)
    assert "generation(pipe)" in message


def sdxl_refiner(pipe):
    return of(StableDiffusionXLImg2ImgPipeline, "sdxl", **pipe.components)


ALL_CHANGED = {"interval": 9, "threshold": 1e-9}


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("when", ["the report is read", "the next generation begins"])
def test_an_unfinished_schedule_is_judged_too(steps, when):
    """SDXL's base leaves the last timesteps to the refiner."""
    pipe = make_pipeline("sdxl")
    cache, merging = apply_feature_cache(pipe, **ALL_CHANGED), apply_token_merging(pipe, ratio=0.5)
    base = {"denoising_end": 0.75, "num_inference_steps": steps, "output_type": "latent"}
    assert said(lambda: base_of(pipe, **base)) == []
    read = when == "the report is read"
    messages = said(lambda: (cache.full, merging.merged) if read else base_of(pipe, **base))
    assert len(messages) == 2 and "raise it" in " ".join(messages) and "max_downsample=2" in " ".join(messages)
    assert said(lambda: (cache.full, merging.merged, base_of(pipe, **base), cache.full, merging.merged)) == []


def base_of(pipe, **options):
    return pipe("a cat", height=32, width=32, generator=torch.Generator().manual_seed(0), **options).images


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_base_and_refiner_that_cache_are_silent(steps):
    pipe = make_pipeline("sdxl")
    refiner = sdxl_refiner(pipe)
    report = apply_feature_cache(pipe, interval=2)  # one UNet, by turns in both

    def both():
        for _ in range(2):
            latents = base_of(pipe, denoising_end=0.5, num_inference_steps=2 * steps, output_type="latent")
            assert report.steps[0].full and report.cached == len(report.steps) // 2 > 0
            options = {"denoising_start": 0.5, "num_inference_steps": 2 * steps, "output_type": "pt"}
            refiner("a cat", image=latents, generator=torch.Generator().manual_seed(0), **options)
            assert report.steps[0].full and report.cached == len(report.steps) // 2 > 0

    assert said(both) == []


@pytest.mark.parametrize("steps", [2, 3, 4])
@pytest.mark.parametrize("form", [list, lambda t: [int(each) for each in t], lambda t: t.clone().flip(0).flip(0)])
@pytest.mark.parametrize("upwards", [False, True])
def test_few_steps_of_ones_own(steps, form, upwards):
    """As of inversion: what caches is silent, what never does is told once it is known to be over."""
    scheduler, unet = DDIMScheduler(), make_unet()
    scheduler.set_timesteps(steps)
    timesteps = form(scheduler.timesteps)
    timesteps = list(timesteps)[::-1] if upwards else timesteps

    def run():
        sample = INPUTS["sample"]
        for timestep in timesteps:
            with torch.no_grad():
                sample = sample - 0.1 * unet(sample, timestep, INPUTS["encoder_hidden_states"]).sample

    with feature_cache(unet, interval=2) as report:
        assert said(lambda: (run(), run(), report.full)) == [] and report.cached == steps // 2
    with feature_cache(unet, **ALL_CHANGED):
        messages = said(lambda: (run(), run(), run()))
        assert ["raise it" in each for each in messages] == [True]


def test_timesteps_that_are_given_to_a_pipeline(pipe):
    options = {"num_inference_steps": None, "timesteps": [900, 500, 100]}
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with feature_cache(pipe, interval=2) as report:
        assert said(lambda: generate(pipe, **options)) == [] and report.cached == 1
    with feature_cache(pipe, **ALL_CHANGED) as report:
        assert ["raise it" in each for each in said(lambda: generate(pipe, **options))] == [True]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["in the UNet", "in the scheduler"])
def test_a_generation_that_is_stopped_early_is_no_broken_promise(pipe, error, where):
    report = apply_feature_cache(pipe, **ALL_CHANGED)
    step, calls = pipe.scheduler.step, []

    def fail(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise error("in the middle")
        return None if where == "in the UNet" else step(*arguments, **options)

    def run():
        calls.clear()
        handle = pipe.unet.conv_out.register_forward_pre_hook(fail) if where == "in the UNet" else None
        if handle is None:
            pipe.scheduler.step = fail
        with pytest.raises(error):
            generate(pipe, num_inference_steps=20)
        if handle is not None:
            handle.remove()
        pipe.scheduler.step = step

    assert said(lambda: (run(), report.full, run(), report.full, run())) == []


def test_a_report_that_is_read_in_mid_run_judges_nothing_too_early():
    """Three steps that change too much, and one that is cached."""
    unet, told = make_unet(), []
    report = apply_feature_cache(unet, interval=9, threshold=0.05)
    with torch.no_grad():
        for number, timestep in enumerate(torch.tensor([900, 700, 500, 300])):
            sample = INPUTS["sample"] * (1 + 0.5 * min(number, 2))
            unet(sample, timestep, INPUTS["encoder_hidden_states"])
            if number < 1:
                told += said(lambda: str(report))
    assert told == [] and report.cached == 1


def test_a_cache_that_is_asked_for_nothing_is_silent(pipe):
    apply_feature_cache(pipe, interval=1)
    assert said(lambda: generate(pipe)) == []


def test_attention_maps_that_are_read_are_made_at_every_step(pipe):
    """As LEDITS++ and Attend-and-Excite do: processors that keep maps for their pipeline."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Keeping(AttnProcessor2_0):
        def __init__(self):
            super().__init__()
            self.attnstore = []

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            self.attnstore.append(hidden_states.shape)
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    processor = Keeping()
    pipe.unet.set_attn_processor(processor)
    plain = generate(pipe)
    calls = len(processor.attnstore)
    report = apply_feature_cache(pipe, interval=2)
    messages = said(lambda: generate(pipe))
    assert any("attention maps" in each for each in messages)
    assert len(processor.attnstore) == 2 * calls and not report.cached
    assert plain.shape == generate(pipe).shape


def test_each_reason_has_a_mend():
    assert set(MENDS) | ASKED_FOR == set(WhyFull)


@pytest.mark.slow
def test_compiled_layers_are_unknown_not_merged():
    unet = make_unet()
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    report = apply_token_merging(unet, ratio=0.5)
    with torch.no_grad():
        for timestep in (900, 500):
            unet(**INPUTS, timestep=timestep)
    assert said(lambda: str(report)) == []
    assert report.merged is None and "2 calls of the model" in str(report) and "unknown" in str(report)
    torch.compiler.reset()
