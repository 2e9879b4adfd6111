"""The table of pipelines: a row is a pipeline or an add-on, a column what is switched on, a cell a test."""

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import generate, hooks, make_pipeline

from tomesd_plus import (
    ToMeProcessor,
    apply_feature_cache,
    apply_preset,
    apply_token_merging,
    merging_report,
    remove_feature_cache,
    remove_preset,
    remove_token_merging,
    tomesd,
)

draw = partial(generate, num_inference_steps=3)


def call(pipe, **options):
    """As :func:`draw`, for pipelines that take neither height nor width."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", generator=generator, output_type="pt", **{"num_inference_steps": 3} | options).images


@dataclass(frozen=True)
class Way:
    """A column: a way of switching something on.

    Args:
        on: ``(pipe, level, ratio)`` to whatever it returns; a ratio of 0 must change no bit.
        off: Undoes it.
        done: ``(pipe, what on has returned)``: whether it did in the latest generation what it is for.
        ratio: False if it has no such thing as a ratio of 0.
        repeats: The same seed gives the same picture again.
    """

    on: Callable[[Any, int, float], Any]
    off: Callable[[Any], Any]
    done: Callable[[Any, Any], bool]
    ratio: bool = True
    repeats: bool = True


def _merges(pipe: Any) -> bool:
    """Whether a processor that was set by itself has met its model, and merges."""
    try:
        return merging_report(pipe).merged
    except ValueError:
        return False


WAYS = {
    "merging": Way(
        lambda pipe, level, ratio: apply_token_merging(pipe, ratio=ratio, max_downsample=level),
        remove_token_merging,
        lambda pipe, report: report.merged,
    ),
    "cache": Way(
        lambda pipe, level, ratio: apply_feature_cache(pipe, interval=2 if ratio else 1),
        remove_feature_cache,
        lambda pipe, report: report.cached > 0,
    ),
    "skipping": Way(
        lambda pipe, level, ratio: apply_feature_cache(pipe, interval=2 if ratio else 1, branch="nothing"),
        remove_feature_cache,
        lambda pipe, report: report.skipped > 0,
    ),
    "bare": Way(
        lambda pipe, level, ratio: pipe.unet.set_attn_processor(ToMeProcessor(ratio=ratio, max_downsample=level)),
        remove_token_merging,
        lambda pipe, report: _merges(pipe),
    ),
    "preset": Way(
        lambda pipe, level, ratio: apply_preset(pipe, "fast", force=True),
        remove_preset,
        lambda pipe, report: report.merging.merged and report.cache.cached + report.cache.skipped > 0,
        ratio=False,
    ),
    "drop-in": Way(
        lambda pipe, level, ratio: tomesd.apply_patch(pipe, ratio=ratio, max_downsample=level),
        tomesd.remove_patch,
        lambda pipe, report: merging_report(pipe).merged,
        repeats=False,  # it draws anew, as tomesd does
    ),
}
PAIR = ("merging", "cache")
OURS = "[Tt]oken merging|A ToMeProcessor|[Nn]o feature cache|A feature cache|[Tt]his preset"
"""How our warnings begin."""


@dataclass(frozen=True)
class Row:
    """A pipeline or an add-on.

    Args:
        name: In the page.
        make: Makes the pipeline.
        run: ``(pipe)`` to its pictures.
        then: What is done with it once merging or a cache is on.
        before: What is done with it before that.
        level: The finest at which its UNet has self-attention, or the coarsest to merge at.
        ways: Its columns.
        fast: Those that are not marked slow.
        refuses: Words of the exception with which a column is refused.
        warns: Words of the warning with which a column does nothing.
        speaks: Words of a warning with which a column works.
        partly: Columns with such a warning that did what they are for in an earlier part of the pipeline's work.
        host_cannot: Why the host itself cannot run it.
    """

    name: str
    make: Callable[[], Any]
    run: Callable[[Any], torch.Tensor] = draw
    then: Callable[[Any], Any] = lambda pipe: None
    before: Callable[[Any], Any] = lambda pipe: None
    level: int = 1
    ways: tuple[str, ...] = PAIR
    fast: tuple[str, ...] = PAIR
    refuses: Mapping[str, str] = field(default_factory=dict)
    warns: Mapping[str, str] = field(default_factory=dict)
    speaks: Mapping[str, str] = field(default_factory=dict)
    partly: tuple[str, ...] = ()
    host_cannot: str = ""


def slow(row: Row) -> Row:
    """The row with all its cells marked slow."""
    return replace(row, fast=())


def of(kind: type, base: str = "sd", **changes: Any) -> Any:
    """A pipeline of another class, of the tiny parts of ``base`` that it takes, and of changed ones."""
    parts = make_pipeline(base).components | {"requires_safety_checker": False} | changes
    accepted = inspect.signature(kind.__init__).parameters
    pipe = kind(**{name: part for name, part in parts.items() if name in accepted})
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    """A picture of noise in [0, 1]."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


_untouched: dict[str, torch.Tensor] = {}


def untouched(row: Row) -> torch.Tensor:
    """The picture of the row's pipeline with nothing of ours on it: the same each time."""
    if row.name not in _untouched:
        pipe = prepared(row)
        row.then(pipe)
        picture = row.run(pipe)
        assert picture.isfinite().all() and torch.equal(row.run(pipe), picture), "the host does not repeat itself"
        _untouched[row.name] = picture
    return _untouched[row.name]


def prepared(row: Row) -> Any:
    """The row's pipeline as a user has it before anything of ours."""
    pipe = row.make()
    row.before(pipe)
    return pipe


def cells(rows: list[Row]) -> pytest.MarkDecorator:
    """The parameters ``row`` and ``way``, with the marks that the rows ask for."""
    found = []
    for row in rows:
        for way in row.ways:
            marks: list[Any] = [] if way in row.fast else [pytest.mark.slow]
            if row.host_cannot:
                marks.append(pytest.mark.skip(reason=row.host_cannot))
            found.append(pytest.param(row, way, marks=marks, id=f"{row.name}: {way}"))
    return pytest.mark.parametrize(("row", "way"), found)


def check(row: Row, way: str, record: Callable[[str, object], None]) -> None:
    """What holds for every cell; records what the page says of it."""
    plain = untouched(row)
    switch = WAYS[way]
    if way in row.refuses:
        one = prepared(row)
        with pytest.raises((TypeError, ValueError, RuntimeError), match=row.refuses[way]) as refusal:
            switch.on(one, row.level, 0.5)
            row.then(one)
            row.run(one)
        record("outcome", f"refused: {_first_sentence(str(refusal.value))}")
        if way != "bare":  # which is refused once it runs, and has dropped the add-on's processors by then
            assert torch.equal(row.run(one), plain)
        return
    if switch.ratio and way not in row.warns:
        one = prepared(row)
        switch.on(one, row.level, 0.0)
        row.then(one)
        assert torch.equal(row.run(one), plain), "ratio 0 has changed the picture"
    one = prepared(row)
    before = hooks(one)
    report = switch.on(one, row.level, 0.5)
    row.then(one)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        first = row.run(one)
        done = switch.done(one, report)
    ours = " ".join(str(each.message) for each in told if _is_ours(each))
    if way in row.warns:
        assert re.search(row.warns[way], ours), ours
        assert not done
        if way in row.partly:
            assert not torch.equal(first, plain)
        else:
            torch.testing.assert_close(first, plain, atol=2e-3, rtol=0)
        record("outcome", f"{'in part' if way in row.partly else 'left alone'}: {_first_sentence(ours)}")
    else:
        assert done, f"nothing happened: {report}"
        assert not torch.equal(first, plain)
        words = row.speaks.get(way)
        assert re.search(words, ours) if words else not ours, ours
        record("outcome", f"works; it says: {_first_sentence(ours)}" if words else "works")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if switch.repeats:
            assert torch.equal(row.run(one), first), "the second picture is another one"
        switch.off(one)
        assert torch.equal(row.run(one), plain), "removal has changed the picture"
    assert hooks(one) == before or row.then is not Row.then


def _is_ours(told: warnings.WarningMessage) -> bool:
    return bool(re.match(OURS, str(told.message)))


def _first_sentence(words: str) -> str:
    """As much of a message as fits into the page: without line breaks, to the first full stop."""
    return re.split(r"(?<=[a-z)])\. ", " ".join(words.split()))[0].rstrip(".")
