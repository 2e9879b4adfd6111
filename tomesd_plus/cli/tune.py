"""``tomesd-plus tune``: what runs at which step, chosen on a model, scheduler and number of steps."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tomesd_plus.cli.common import check_writable, console, fail, load, run
from tomesd_plus.cli.options import (
    Device,
    Dtype,
    Guidance,
    Model,
    Prompts,
    Scheduler,
    Seed,
    Size,
    Steps,
    prompts_from,
    sampling_from,
)
from tomesd_plus.evaluation.names import TINY

if TYPE_CHECKING:
    from tomesd_plus.presets import Preset

COLUMNS = ["what", "steps", "speed-up", "whole", "PSNR dB", "aside dB", "plan"]


def tune_command(
    prompts: Prompts = None,
    model: Model = TINY,
    speedup: Annotated[
        list[float] | None, typer.Option(help="Of the denoising, larger than 1; repeatable. Default: 2, 2.5 and 3.")
    ] = None,
    psnr: Annotated[
        float | None, typer.Option(help="In place of --speedup: the fastest within so many dB.", show_default=False)
    ] = None,
    steps: Steps = 20,
    free: Annotated[bool, typer.Option(help="Let it choose fewer solver steps, too.")] = False,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    seed: Seed = 0,
    size: Size = None,
    device: Device = None,
    dtype: Dtype = None,
    generations: Annotated[int, typer.Option(min=5, help="Work, in untouched generations of all prompts.")] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in one call.")] = 1,
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("tuned"),
) -> None:
    """Choose what each step runs on a model, scheduler, number of steps and device, at several speed-ups.

    Writes a preset a speed-up, which --preset takes, a table and a plot. Ctrl-C ends it with the best so far.
    """
    chosen = prompts_from(prompts, model)
    if speedup and psnr is not None:
        fail("give either --speedup or --psnr")
    if wrong := [each for each in speedup or [] if not each > 1]:
        fail(f"a speed-up must be larger than 1, not {wrong[0]:g}")
    sampling = sampling_from(steps, guidance, size, model)
    check_writable(out)
    pipe, where = load(model, device, dtype, scheduler=scheduler)
    from tomesd_plus.tuning import tune

    call: dict[str, Any] = {} if sampling.height is None else {"height": sampling.height, "width": sampling.width}
    goal: dict[str, Any] = {"psnr": psnr} if psnr is not None else {"speedup": sorted(set(speedup or [2.0, 2.5, 3.0]))}
    found = run(
        lambda: tune(
            pipe, chosen, num_inference_steps=steps, guidance_scale=sampling.guidance_scale, seed=seed,
            steps="free" if free else "kept", max_generations=generations, batch_size=batch_size, **goal, **call,
        )
    )  # fmt: skip
    presets = found if isinstance(found, list) else [found]
    rows = []
    for number, preset in enumerate(presets):
        wanted = goal["speedup"][number] if psnr is None else f"{psnr:g}dB"
        path = out / f"{wanted}{'' if psnr is not None else 'x'}.json"
        preset.save(path)
        rows += rows_of(preset, path.name)
    write_rows(rows, out / "table.csv")
    console.print(table_of(rows, f"{model}, {scheduler or type(pipe.scheduler).__name__}, {steps} steps, {where}"))
    figure(rows, out / "plot.png")
    console.print(f"Presets, table and plot: {out}")
    presets_rows = [row for row in rows if row["what"].endswith(".json")]
    others = [f"{row['what']} with {row['steps']}" for row in presets_rows if row["steps"] != str(steps)]
    if others:
        console.print(f"To be called with other numbers of steps: {', '.join(others)}.")


def rows_of(preset: "Preset", name: str) -> list[dict[str, str]]:
    """A preset's figures, and those beside it, as text."""
    told = preset.measured
    assert told is not None
    letters = preset.cache.plan.letters if preset.cache is not None and preset.cache.plan is not None else "all full"
    whole = "" if told.whole_speedup is None else f"{told.whole_speedup:.2f}"
    own = [
        name,
        str(preset.steps),
        f"{told.speedup:.2f}",
        whole,
        f"{told.psnr:.1f}",
        _text(told.held_out_psnr),
        letters,
    ]
    rows = [own]
    for row in told.beside:
        fewer = row.name.endswith(" steps")
        steps = row.name.split(" ")[0] if fewer else str(len(row.name))
        plan = ["fewer steps" if fewer else "best even plan", steps, f"{row.speedup:.2f}", "", _text(row.psnr)]
        rows.append([*plan, _text(row.held_out_psnr), "" if fewer else row.name])
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def write_rows(rows: list[dict[str, str]], path: Path) -> None:
    """The table as a file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def table_of(rows: list[dict[str, str]], title: str) -> Table:
    """The table that is printed."""
    table = Table(title=title, caption="PSNR to the untouched pictures; aside: of prompts that nothing was chosen on.")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("what", "plan") else "right", overflow="fold")
    for row in rows:
        table.add_row(*row.values(), style="bold" if row["what"].endswith(".json") else None)
    return table


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Speed-up and fidelity of the tuned plans, and of what stands beside them."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6, 4), layout="constrained")
    axes = drawn.subplots()
    kinds = {"tuned": "tab:green", "best even plan": "tab:blue", "fewer steps": "black"}
    for kind, colour in kinds.items():
        own = [row for row in rows if (row["what"] == kind or (kind == "tuned" and row["what"].endswith(".json")))]
        points = sorted({(float(row["speed-up"]), float(row["PSNR dB"])) for row in own if row["PSNR dB"]})
        if points:
            axes.plot(*zip(*points), marker="o", color=colour, label=kind, linewidth=1)
    axes.set_xlabel("speed-up of the denoising calls")
    axes.set_ylabel("PSNR to the untouched pictures, dB")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn.savefig(path, dpi=130)
