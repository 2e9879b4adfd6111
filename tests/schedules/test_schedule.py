import csv
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tomesd_plus import ConstantSchedule, CosineSchedule, LinearSchedule, StepsSchedule
from tomesd_plus.schedules import schedule_by_name

SCHEDULES = [ConstantSchedule(0.4), LinearSchedule(0.7, 0.2), CosineSchedule(0.6, 0.1), StepsSchedule((0.7, 0.4, 0.1))]
ratios = st.floats(0, 0.75)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_ends_direction_and_mean(schedule):
    assert schedule(1.0) == pytest.approx(schedule.ratios[0])
    assert schedule(0.0) == pytest.approx(schedule.ratios[-1])
    levels = [i / 100 for i in range(101)]
    values = [schedule(level) for level in levels]
    assert values == sorted(values)  # more at noisy steps
    assert [schedule.reversed()(1 - level) for level in levels if level != 0.5] == pytest.approx(
        [v for v, level in zip(values, levels) if level != 0.5],
        abs=0.31 if isinstance(schedule, StepsSchedule) else 1e-9,
    )
    assert schedule.mean() == pytest.approx(math.fsum(schedule.ratios) / len(schedule.ratios), abs=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@given(mean=ratios)
def test_a_mean_can_be_asked_for(schedule, mean):
    moved = schedule.with_mean(mean)
    assert type(moved) is type(schedule)
    assert moved.mean() == pytest.approx(mean, abs=2e-3)
    assert all(0 <= moved(level / 50) <= 0.75 + 1e-9 for level in range(51))


def test_mean_over_given_noise_levels():
    assert LinearSchedule(0.6, 0.2).mean([1.0, 0.5]) == pytest.approx(0.5)


@given(noisy=ratios, clean=ratios, count=st.integers(1, 8))
def test_quantizing_leaves_few_ratios_and_the_mean(noisy, clean, count):
    schedule = CosineSchedule(noisy, clean)
    plateaus = schedule.quantized(count)
    assert len({plateaus(i / 999) for i in range(1000)}) <= count
    assert plateaus.mean() == pytest.approx(schedule.mean(), abs=2e-3)


def test_steps_fall_at_equal_distances():
    steps = StepsSchedule((0.7, 0.5, 0.3))
    assert [steps(level) for level in (1.0, 0.7, 0.6, 0.4, 0.3, 0.0)] == [0.7, 0.7, 0.5, 0.5, 0.3, 0.3]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ConstantSchedule(1.0), r"\[0, 1\)"),
        (lambda: LinearSchedule(0.5, -0.1), r"\[0, 1\)"),
        (lambda: CosineSchedule(float("nan"), 0.1), r"\[0, 1\)"),
        (lambda: StepsSchedule(()), "at least one"),
        (lambda: ConstantSchedule("0.5"), r"\[0, 1\)"),
        (lambda: LinearSchedule().with_mean(0.9), "is impossible"),
        (lambda: LinearSchedule().quantized(0), "at least 1"),
    ],
)
def test_what_is_out_of_range_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_plot_shows_the_schedule():
    ax = LinearSchedule(0.6, 0.2).plot(label="a line")
    (line,) = ax.lines
    assert line.get_label() == "a line"
    assert line.get_xydata()[0] == pytest.approx([1.0, 0.6]) and line.get_xydata()[-1] == pytest.approx([0.0, 0.2])
    assert ax.lines and CosineSchedule().plot(ax) is ax and len(ax.lines) == 2


@pytest.mark.parametrize("mean", [0.3, 0.5])
def test_auto_is_what_the_published_ablation_has_at_the_top(mean):
    table = Path(__file__).parents[2] / "results" / "ablation-schedules.csv"
    rows = {row["configuration"]: float(row["PSNR dB"] or "inf") for row in csv.DictReader(table.open())}
    kinds = {
        schedule_by_name(name, mean, more_at): rows[f"{name}, more at {more_at} steps, {mean}"]
        for name in ("linear", "cosine")
        for more_at in ("noisy", "clean")
    }
    kinds[schedule_by_name("constant", mean)] = rows[f"constant, {mean}"]
    assert schedule_by_name("auto", mean) == max(kinds, key=lambda schedule: kinds[schedule])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "steps", "auto"])
def test_a_schedule_by_name_has_the_ratio_as_its_mean(name):
    assert schedule_by_name(name, 0.4).mean() == pytest.approx(0.4, abs=1e-3)


def test_a_schedule_by_name_goes_both_ways():
    noisy, clean = (schedule_by_name("linear", 0.5, end) for end in ("noisy", "clean"))
    assert noisy == clean.reversed() and noisy(1.0) > noisy(0.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sine", 0.5), "constant, linear, cosine, steps, auto"),
        (("linear", 0.5, "dusk"), "'noisy' or 'clean'"),
        (("linear", 0.8), "more than the cells allow"),
        (("linear", "half"), r"\[0, 1\)"),
    ],
)
def test_a_name_or_mean_out_of_range_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        schedule_by_name(*arguments)
