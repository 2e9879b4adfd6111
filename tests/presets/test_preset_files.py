"""Presets as files: saved and loaded, carried over to other steps, and strangers' files."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from cache_tools import kinds
from conftest import generate, hooks, make_pipeline
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tomesd_plus import (
    PRESETS,
    AdaptiveRatio,
    FeatureCacheConfig,
    FullSteps,
    LinearSchedule,
    Preset,
    StepPlan,
    ToMeConfig,
    apply_feature_cache,
    apply_preset,
    preset,
    remove_preset,
)
from tomesd_plus.host.names import model_name, scheduler_name
from tomesd_plus.presets import Measured, Row
from tomesd_plus.presets.files import encoded

LEVELS = tuple(each / 999 for each in range(876, 0, -125))
PLAN = Preset("mine", None, FeatureCacheConfig(plan=StepPlan("FSSFCSFC", LEVELS), order=1), steps=8)
MEASURED = Measured(
    "UNet", "DDIM", 8, 5.0, "16 × 16", "CPU, float32", "torch 2", 3, 1, 2.5, None, 40.0, 39.5, {"cached": 0.1}, False,
    30, (Row("4 steps", 2.0, 35.0), Row("FCFC", 2.1, 36.0, 35.0)),
)  # fmt: skip


@pytest.mark.parametrize(
    "chosen",
    [
        *PRESETS.values(),
        PLAN,
        replace(PLAN, measured=MEASURED),
        Preset("", ToMeConfig(ratio={1: LinearSchedule(), 2: 0.25}, full_steps=FullSteps("cache", 0.5)), None),
        Preset("", ToMeConfig(ratio=AdaptiveRatio(), layers="block", cell_size=(3, 2)), None, merging_inside=None),
    ],
)
def test_what_is_saved_is_loaded(chosen, tmp_path):
    chosen.save(tmp_path / "mine.json")
    assert Preset.load(tmp_path / "mine.json") == chosen
    assert json.loads((tmp_path / "mine.json").read_text())["version"] == 1
    assert Preset.from_json(chosen.to_json()) == chosen and chosen.to_json() == (tmp_path / "mine.json").read_text()


@pytest.mark.parametrize("text", ["", "\ud800", b"\xff", "[]", '{"format": "tomesd_plus preset"}', "1" * 2_000_000])
def test_texts_that_are_no_presets_are_refused(text):
    with pytest.raises(ValueError, match=r"^what was given as a preset is "):
        Preset.from_json(text)


@pytest.mark.parametrize("given", [None, 3, {}, Preset("", None, None)])
def test_what_is_no_text_is_refused(given):
    with pytest.raises(ValueError, match="must be JSON text"):
        Preset.from_json(given)


def test_a_file_is_taken_wherever_a_name_is(pipe, tmp_path):
    PLAN.save(tmp_path / "mine.json")
    plain = generate(pipe, num_inference_steps=8)
    apply_feature_cache(pipe, PLAN.cache)
    expected = generate(pipe, num_inference_steps=8)
    remove_preset(pipe)
    for chosen in (PLAN, tmp_path / "mine.json", str(tmp_path / "mine.json")):
        with preset(pipe, chosen) as report:
            assert torch.equal(generate(pipe, num_inference_steps=8), expected) and report.merging is None
            assert kinds(report.cache) == "FssFcsFc" and "skipped" in str(report)
        assert torch.equal(generate(pipe, num_inference_steps=8), plain) and not hooks(pipe)


def test_it_is_carried_over_to_other_steps_without_a_word(pipe):
    report = apply_preset(pipe, PLAN)
    carried = ((8, "FssFcsFc"), (4, "FFcF"), (16, "FssFssFFccFssFcc"), (30, "FFFssFssFssFssFccFcsFssFssFccF"))
    for steps, pattern in carried:  # with more steps none but the plan's own runs of skipped ones
        generate(pipe, num_inference_steps=steps)
        assert kinds(report.cache) == pattern


def test_a_preset_for_fewer_steps_says_so_once_where_it_is_called_with_others(pipe):
    here = replace(MEASURED, model=model_name(pipe.unet), scheduler=scheduler_name(pipe.scheduler), steps=12)
    report = apply_preset(pipe, replace(PLAN, measured=here))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(pipe, num_inference_steps=8)
    with pytest.warns(UserWarning, match="to be called with num_inference_steps=8, .* was called with 12") as told:
        for _ in range(2):
            generate(pipe, num_inference_steps=12)
    assert len(told) == 1 and report.cache.full > 4
    remove_preset(pipe)
    assert not hooks(pipe)


def test_a_preset_of_fewer_steps_alone_says_so_when_it_is_applied(pipe):
    here = replace(MEASURED, model=model_name(pipe.unet), scheduler=scheduler_name(pipe.scheduler), steps=12)
    for target in (pipe, pipe.unet):
        with pytest.warns(UserWarning, match="to be called with num_inference_steps=8"):
            apply_preset(target, Preset("8 steps", None, None, steps=8, measured=here))
    assert not hooks(pipe)
    with pytest.warns(UserWarning, match="to be called with num_inference_steps=8"):  # no scheduler is known
        apply_preset(pipe.unet, replace(PLAN, measured=replace(here, scheduler="none")))


def test_carried_over_the_last_step_stays_full(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.scheduler.set_timesteps(8)
    levels = tuple((pipe.scheduler.timesteps / 999).tolist())
    report = apply_feature_cache(pipe, plan=StepPlan("FSCFSCSF", levels), forecast=1.0)
    for steps in (5, 7, 8, 11, 20):
        generate(pipe, num_inference_steps=steps)
        assert kinds(report)[-1] == "F" and report.full < steps


def test_another_scheduler_or_model_is_told_once(pipe):
    here = replace(MEASURED, model=model_name(pipe.unet), scheduler=scheduler_name(pipe.scheduler))
    with preset(pipe, replace(PLAN, measured=here)):
        generate(pipe)
    with pytest.warns(UserWarning, match="chosen on another model") as told:
        apply_preset(pipe, replace(PLAN, measured=MEASURED))
    generate(pipe)
    assert len(told) == 1 and "scheduler" in str(told[0].message) and "tune" in str(told[0].message)
    remove_preset(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.warns(UserWarning, match=r"another scheduler \(DDIM.*here: Euler"):
        apply_preset(pipe, replace(PLAN, measured=here))


def test_a_preset_that_skips_calls_and_one_that_caches_on_sdxl():
    pipe = make_pipeline("sdxl")
    apply_preset(pipe, PLAN)
    with pytest.raises(ValueError, match="already applied"):
        apply_preset(pipe, PLAN)
    remove_preset(pipe)
    with pytest.warns(UserWarning, match="not applied"):
        remove_preset(pipe)


GOOD = {"format": "tomesd_plus preset", "version": 1}


def cache(**options):
    data = {"kind": "Preset", "description": "x", "merging": None}
    return GOOD | {"preset": data | {"cache": {"kind": "FeatureCacheConfig"} | options}}


def whole(**fields):
    data = {"kind": "Preset", "description": "", "merging": None, "cache": None}
    return GOOD | {"preset": data | fields}


MEASURED_DATA = encoded(MEASURED)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "cannot be read as JSON"), ("[" * 100_000, "cannot be read as JSON"), ("{}", "does not say"),
        (b"\xff\xfe", "cannot be read as JSON"), ("[1]", "does not say"), ("x" * 1_000_001, "larger than"),
        ('{"format": "tomesd_plus preset", "version": NaN}', "JSON"),
        (GOOD, "no preset in it"), (GOOD | {"version": 2, "preset": {}}, "of version 2"),
        (GOOD | {"preset": {}, "run": "rm"}, "it has run"),
        (GOOD | {"preset": {"kind": "os.system", "command": "true"}}, "unknown kind 'os.system'"),
        (GOOD | {"preset": {"kind": "StepPlan", "letters": "F"}}, "holds no preset but a StepPlan"),
        (GOOD | {"preset": 3}, "holds no preset but a int"), (cache(command="x"), "has no command"),
        (cache(plan={"kind": "StepPlan", "letters": "F" * 1500}), "1000 steps at most"),
        (cache(plan={"kind": "StepPlan", "letters": "FAB"}), "letters F, C and S"),
        (cache(plan={"kind": "StepPlan", "letters": "F", "noise_levels": [10**400]}), "StepPlan"),
        (cache(plan={"kind": "StepPlan", "letters": "F", "repeats": 1}), "repeats must be"),
        (cache(plan={"kind": "StepPlan", "letters": "F", "repeats": True, "noise_levels": [0.5]}), "no noise levels"),
        (cache(interval=-1), "interval must be"), (cache(forecast="1"), "forecast must be"),
        (cache(full_steps=list(range(3000))), "longer than"), (cache(interval=[[[[[[[[[[1]]]]]]]]]]), "nested deeper"),
        (cache(plan={"kind": "mapping", "entries": [[1, 2, 3]]}), "pair"), (cache(full_steps=3), "FeatureCacheConfig"),
        (cache(plan={"kind": "Preset", "description": "", "merging": None, "cache": None}), "must be a word"),
        (whole(description=3), "must be a text"), (whole(merging=3), "merging must be"), (whole(steps=0), "steps"),
        (whole(merging={"kind": "ToMeConfig", "seed": "x"}), "seed must be"),
        (whole(steps=10**30), "steps must be"), (whole(description="a\x1b[31mred"), "a text of one line"),
        (whole(measured=MEASURED_DATA | {"model": "a\nWarning: run this"}), "model must be a text of one line"),
        (whole(measured=MEASURED_DATA | {"generations": 10**30}), "generations must be a whole number"),
        (whole(measured=MEASURED_DATA | {"speedup": 1e300}), "speedup must be a number"),
    ],
)  # fmt: skip
def test_a_strangers_file_is_refused_in_words(content, match, pipe, tmp_path):
    path = tmp_path / "stranger.json"
    path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else
                     json.dumps(content)).encode())  # fmt: skip
    with pytest.raises(ValueError, match=match):
        apply_preset(pipe, path)
    assert not hooks(pipe)


def test_what_is_no_preset_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="quality, balanced, fast"):
        apply_preset(pipe, "best")
    with pytest.raises(ValueError, match=r"cannot read the preset .*No such file"):
        apply_preset(pipe, tmp_path / "none.json")
    for long in ("x" * 5000, "x/" * 5000, "x" * 5000 + ".json"):
        with pytest.raises(ValueError, match="cannot read the preset"):
            apply_preset(pipe, long)
    with pytest.raises(ValueError, match="expected a preset"):
        apply_preset(pipe, 3)
    for wrong in ({"measured": 3}, {"steps": True}, {"cache": 3}, {"description": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(PLAN, **wrong)
    for wrong in ({"speedup": float("nan")}, {"prompts": -1}, {"costs": 3}, {"model": "x" * 3000}, {"beside": (3,)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(MEASURED, **wrong)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("Preset")
NAMES = st.sampled_from(["kind", "cache", "merging", "plan", "description", "letters", "entries"])
ANY = st.recursive(PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(NAMES, x, max_size=4))


@settings(max_examples=50, deadline=None)
@given(ANY)
def test_any_json_gives_a_preset_or_a_value_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "any.json"
    path.write_text(json.dumps(GOOD | {"preset": data}))
    with pytest.raises(ValueError):
        Preset.load(path)
