"""What the page says: figures, progress, errors; as HTML, and as numbers for callers of the API."""

import json
import logging
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from gradio_app.results import Result
from gradio_app.runs import Progress
from gradio_app.settings import Refused

WELCOME = "Press <b>Compare</b>. The first run of a kind begins with a warm-up, which is not timed."
EXPLORE_WELCOME = "Choose what to try, then press <b>Explore</b>: one picture each, all from the same seed."
CANCELLED = "Cancelled. The pipeline is as it was."
NOT_REMEMBERED = "Press <b>Compare</b>: the picture without merging is not there for these settings."
EXAMPLES: dict[bool, dict[str, str]] = {
    True: {
        "dog": "a large dog on a blue background",
        "strawberry": "a small strawberry on the left of a yellow striped background",
        "ladybug": "a large ladybug on a pink gradient background",
        "star": "a small star and a small red heart on a purple background",
    },
    False: {
        "fox": "a photo of a fox in the snow",
        "lighthouse": "a lighthouse at sunset, oil painting",
        "fruit": "a bowl of fruit on a wooden table",
        "street": "a street in the rain at night, neon lights",
    },
}
"""Prompts by a word, for the embedded pipeline, which knows emoji only, and for any other."""


def status(text: str, kind: str = "idle") -> str:
    """A line under the pictures; ``text`` is HTML."""
    return f'<div class="status {kind}" role="status">{text}</div>'


ENDED = f"shown => shown.includes('class=\"status running\"') ? {json.dumps(status(CANCELLED))} : shown"
"""In the page: its status after a run, which was cancelled if nothing else was told."""


def progress_bar(progress: Progress) -> str:
    """A run's progress, as a bar."""
    share = progress.done / max(1, progress.total)
    return status(
        f'<div class="bar"><div style="width:{share:.1%}"></div></div>'
        f"<span>{escape(progress.what)} · step {progress.done} of {progress.total}</span>",
        "running",
    )


def finished(results: Sequence[Result], device: str) -> str:
    """Notes on a run's figures."""
    first = results[0]
    notes = [f"Measured once, on this machine: {device}."]
    if first.warmed_up:
        notes.append("First run of its kind: an untimed warm-up went before.")
    if first.remembered:
        notes.append("The picture without merging is remembered, and so is its time.")
    if len(results) == 1 and first.cached_steps + first.skipped_steps:
        notes.append(f"Of {first.steps} steps {first.cached_steps} were cached, {first.skipped_steps} skipped.")
    for result in results:
        notes += [
            f"{result.candidate.name.capitalize()}: {note}" if len(results) > 1 else note for note in result.notes
        ]
    return status(" ".join(map(escape, notes)), "done")


def figures(result: Result) -> str:
    """Cards with a comparison's figures."""
    baseline, merged = result.baseline, result.merged
    removed = " · ".join(f"{share:.0%}, level {level}" for level, share in result.removed.items()) or "none"
    cards = [
        ("Speed-up", f"{result.speedup:.2f}×", "Time without merging divided by time with it."),
        ("Time", f"{baseline.seconds:.2f} → {merged.seconds:.2f} s", "Without → with, of the whole call."),
        ("PSNR", _psnr(result), "How close the pictures are: above 40 dB hardly anyone sees a difference."),
        ("SSIM", f"{result.ssim:.3f}", "How alike their structures are: 1 for equal pictures."),
        ("Peak memory", f"{_memory(baseline.memory_mib)} → {_memory(merged.memory_mib)}",
         "Without → with: GPU memory, or the whole program's on a CPU."),
        ("Tokens removed", removed, "Share of all tokens at that level (1: full resolution), over all steps."),
    ]  # fmt: skip
    return '<div class="cards">' + "".join(
        f'<div class="card" title="{escape(hint)}"><span>{escape(name)}</span><b>{escape(value)}</b></div>'
        for name, value, hint in cards
    ) + "</div>"  # fmt: skip


def empty_figures() -> str:
    """The cards before the first run."""
    names = ("Speed-up", "Time", "PSNR", "SSIM", "Peak memory", "Tokens removed")
    cards = "".join(f'<div class="card"><span>{name}</span><b>–</b></div>' for name in names)
    return f'<div class="cards">{cards}</div>'


def numbers(result: Result) -> dict[str, Any]:
    """A comparison's figures for callers of the API."""
    return {
        "name": result.candidate.name,
        "seconds": result.merged.seconds,
        "baseline_seconds": result.baseline.seconds,
        "speedup": result.speedup,
        "psnr": result.psnr,
        "identical": result.psnr is None,
        "ssim": result.ssim,
        "memory_mib": result.merged.memory_mib,
        "baseline_memory_mib": result.baseline.memory_mib,
        "removed": {str(level): share for level, share in result.removed.items()},
        "cached_steps": result.cached_steps,
        "skipped_steps": result.skipped_steps,
        "remembered": result.remembered,
        "warmed_up": result.warmed_up,
        "notes": list(result.notes),
    }


def caption(result: Result) -> str:
    """Below a picture of the grid."""
    return f"{result.candidate.name} · {result.speedup:.2f}× · {_psnr(result)}"


def in_words(error: BaseException) -> str:
    """An error for the page; one that is no user's fault is logged too."""
    if isinstance(error, Refused):
        text = str(error).rstrip(".")
        return text[:1].upper() + text[1:] + "."
    if re.search("out of memory|can't allocate memory", str(error)):
        return "Out of memory. Choose a smaller size."
    logging.getLogger(__name__).error("a run failed", exc_info=error)
    return f"The run failed on the server ({type(error).__name__}). The pipeline is as it was; try again."


def _psnr(result: Result) -> str:
    return "identical" if result.psnr is None else f"{result.psnr:.1f} dB"


def _memory(mebibytes: float) -> str:
    return f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"
