"""Speed beside fidelity: an evaluation of the embedded pipeline joined with a benchmark of Stable Diffusion's shape.

Writes ``grid.csv``, ``grid.md`` (the best at least so fast, then all rows) and ``grid.png`` into the current folder,
from ``results/grid-scores.csv`` (the ``results.csv`` of an evaluation of ``examples/grid.yaml``) and
``results/cpu.csv`` (of ``tomesd-plus benchmark``).

A speed-up is that of a full denoising loop: of a preset as it was measured, of other caches from the times of full and
cached steps, as many of each as the evaluation's steps make. A plain cache counts at the faster of our time and the
DeepCache package's, whose pictures are the same, one with a forecast at ours; a forecast counts as free, a speed-up at
two decimals, a schedule as its mean ratio, a cell of any size as one of 2 × 2, and full steps as exactly every
fourth.
"""

import csv
from math import ceil
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tomesd_plus.benchmark.settings import NAMED
from tomesd_plus.evaluation.configurations import BASELINE, NOISE_FLOOR, Configuration, load_configurations

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results"
WORKLOAD = {"shape": "sd15", "size": "512", "batch": "2", "dtype": "float32", "mode": "eager"}
COLUMNS = {  # of the scores: their names in the table, and digits
    "PSNR dB": ("PSNR dB", 1),
    "SSIM": ("SSIM", 3),
    "Fréchet distance (tiny CLIP)": ("distance", 4),
    "CLIP score (tiny CLIP)": ("CLIP score", 1),
}
DEEPCACHE = "cache (DeepCache's pictures)"
KINDS = {  # in the picture
    "fewer steps": ("black", "s"),
    "tomesd": ("tab:gray", "v"),
    DEEPCACHE: ("tab:blue", "o"),
    "cache with forecast": ("tab:cyan", "o"),
    "merging": ("tab:orange", "^"),
    "merging and cache": ("tab:red", "D"),
    "presets": ("tab:green", "*"),
}
PEERS = ["fewer steps", DEEPCACHE, "tomesd"]
SPEEDS = [1.2, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0]  # of the front
FREE = {"ratio", "schedule", "more_at", "cell_size"}  # options that decide how many tokens go, and where
DETAILS = ["attn1, plan per block", "attn1, full every 4"]
ATTENTION_CACHE = "attention cache 4"
AS_PRESETS = "as presets + cache 5"


class Speeds:
    """Speed-ups of whole denoisings, from a benchmark's rows."""

    def __init__(self, path: Path) -> None:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if all(row[key] == WORKLOAD[key] for key in WORKLOAD)]
        self._measured = {(row["setting"], row["ratio"]): float(row["speedup"]) for row in rows if row["speedup"]}

    def of(self, configuration: Configuration, steps: int) -> float | None:
        """Of a configuration at so many steps; ``None`` if the benchmark lacks it."""
        own, switches = configuration.steps or steps, configuration.switches
        try:
            if "preset" in switches:
                return self._measured[f"preset {switches['preset']['name']}", ""]  # itself a whole denoising
            if "tomesd" in switches:
                return self._measured["tomesd package", f"{switches['tomesd']['ratio']:g}"]
            if switches == NAMED[ATTENTION_CACHE]:
                return self._measured[ATTENTION_CACHE, ""]
            merge = switches.get("merge", {})
            ratio = f"{merge['ratio']:g}" if merge else ""
            options = {name: value for name, value in merge.items() if name not in FREE}
            skipped = None
            if isinstance(full_steps := options.get("full_steps"), dict):
                options["full_steps"], skipped = full_steps["every"], full_steps["ratio"]
            if options == NAMED[AS_PRESETS]["merge"]:
                full, cached = self._steps_as_presets(ratio, skipped)
            elif options:
                alike = (name for name in DETAILS if NAMED[name]["merge"] == options and "cache" not in switches)
                return self._measured[next(alike, ""), ratio]
            else:
                full = 1 / self._measured["attn1" if ratio else "untouched", ratio]
                cached = self._cached_step(ratio, switches["cache"], full) if "cache" in switches else full
        except KeyError:
            return None
        cache = switches.get("cache", {"interval": 1})
        count = len(cache["full_steps"]) if "full_steps" in cache else ceil(own / cache["interval"])
        return steps / (count * full + (own - count) * cached)

    def _cached_step(self, ratio: str, cache: dict[str, Any], full: float) -> float:
        """Its time as a share of the untouched UNet's step."""
        interval = cache["interval"]
        speedup = self._measured[f"{'attn1 + ' if ratio else ''}cache {interval}", ratio]
        if not ratio and not cache.get("forecast"):  # the package has none
            speedup = max(speedup, self._measured[f"DeepCache {interval}", ""])
        return (interval / speedup - full) / (interval - 1)

    def _steps_as_presets(self, ratio: str, skipped: float | None) -> tuple[float, float]:
        """Times of a full and of a cached step that merge as presets do, as shares of the untouched UNet's."""
        interval, full = NAMED[AS_PRESETS]["cache"]["interval"], 1.0
        cached = (interval / self._measured[AS_PRESETS, ratio] - full) / (interval - 1)
        if skipped is not None:
            name = AS_PRESETS.replace(" +", f", skipped {skipped:g} +")
            full = interval / self._measured[name, ratio] - (interval - 1) * cached
        return full, cached


def kind(configuration: Configuration) -> str:
    """Under which heading it goes."""
    switches = configuration.switches
    if switches == NAMED[ATTENTION_CACHE]:
        return "merging"  # stands beside detail-keeping, which also keeps outputs of full steps
    if "cache" in switches and "merge" not in switches:
        return "cache with forecast" if switches["cache"].get("forecast") else DEEPCACHE
    names = {"preset": "presets", "tomesd": "tomesd", "cache": "merging and cache", "merge": "merging"}
    return next((name for switch, name in names.items() if switch in switches), "fewer steps")


def main() -> None:
    """Write the three files."""
    with (RESULTS / "grid-scores.csv").open(newline="", encoding="utf-8") as file:
        scores = list(csv.DictReader(file))
    known = {each.name: each for each in load_configurations(HERE / "examples" / "grid.yaml")}
    speeds = Speeds(RESULTS / "cpu.csv")
    steps = int(scores[0]["steps"])
    table = []
    for row in scores:
        untouched = row["configuration"] in (BASELINE.name, NOISE_FLOOR.name)
        configuration = Configuration("untouched") if untouched else known[row["configuration"]]
        speedup, together = speeds.of(configuration, steps), _product(speeds, configuration, steps)
        figures = {"speed-up": _text(speedup, 2), "product of both alone": _text(together, 2)}
        figures |= {name: _text(row[column], digits) for column, (name, digits) in COLUMNS.items()}
        table.append({"configuration": row["configuration"], **figures})
    with Path("grid.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    timed = [(kind(known[row["configuration"]]), row) for row in table if row["configuration"] in known]
    timed = [(name, row) for name, row in timed if row["speed-up"]]
    head = f"{scores[0]['images']} held-out captions of the embedded pipeline, {steps} steps, guidance "
    head += f"{float(scores[0]['guidance_scale']):g}; speed-ups of whole denoisings at SD 1.5's shape,\n"
    head += "512 × 512, batch 2, float32, two CPU cores.\n"
    text = f"{head}\nThe closest pictures, PSNR in dB, at least so fast:\n\n{_markdown(_front(timed))}"
    Path("grid.md").write_text(f"{text}\nAll rows:\n\n{_markdown(table)}", encoding="utf-8")
    _draw(timed)


def _product(speeds: Speeds, configuration: Configuration, steps: int) -> float | None:
    """What merging and the cache would gain together if neither took from what is left for the other."""
    if "full_steps" in configuration.switches.get("merge", {}):
        return None  # without a cache it merges on every step, which is another thing
    parts = [Configuration("part", {each: configuration.switches[each]}) for each in configuration.switches]
    alone = [speeds.of(part, steps) for part in parts]
    return alone[0] * alone[1] if len(alone) == 2 and alone[0] and alone[1] else None


def _front(timed: list[tuple[str, dict[str, str]]]) -> list[dict[str, str]]:
    """The best of ours and of each peer at several speed-ups; the best of a line is bold."""
    lines = []
    columns = ["ours", *(peer for peer in PEERS if any(name == peer for name, _ in timed))]
    for speed in SPEEDS:
        fast = [(name, row) for name, row in timed if float(row["speed-up"]) >= speed]
        best = {"speed-up": f"{speed:g}×"}
        top = max(float(row["PSNR dB"]) for _, row in fast)
        for column in columns:
            own = [row for name, row in fast if name == column or (column == "ours" and name not in PEERS)]
            first = max(own, key=lambda row: float(row["PSNR dB"]), default=None)
            mark = "**" if first and float(first["PSNR dB"]) == top else ""
            best[column] = f"{mark}{first['PSNR dB']}{mark} {first['configuration']}" if first else ""
        lines.append(best)
    return lines


def _markdown(table: list[dict[str, str]]) -> str:
    lines = [list(table[0]), ["---", *["--:"] * (len(table[0]) - 1)], *(list(row.values()) for row in table)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _draw(timed: list[tuple[str, dict[str, str]]]) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, (colour, marker) in KINDS.items():
        points = sorted((float(row["speed-up"]), float(row["PSNR dB"])) for own, row in timed if own == name)
        line = "-" if name in ("fewer steps", DEEPCACHE, "cache with forecast", "presets") else ""
        if points:
            axes.plot(*zip(*points), marker=marker, color=colour, linestyle=line, label=name, linewidth=1)
    axes.set_xlabel("speed-up of a whole denoising (SD 1.5's shape, 512 × 512)")
    axes.set_ylabel("PSNR to the untouched pictures, dB (embedded pipeline)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig("grid.png", dpi=130)


def _text(value: str | float | None, digits: int) -> str:
    return "" if value in ("", None) else f"{float(value):.{digits}f}"


if __name__ == "__main__":
    main()
