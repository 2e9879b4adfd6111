"""The page's two plots as inline SVG: sharp at any size, in the colours of the page, dark or light."""

from collections.abc import Sequence
from html import escape

from gradio_app.results import Result
from tomesd_plus.schedules import Schedule

WIDTH, HEIGHT = 300, 110  # of the curve
PLOT_WIDTH, PLOT_HEIGHT = 300, 250
HIGHEST_RATIO = 0.8


def curve(schedule: Schedule, hint: str | None = None) -> str:
    """The ratio over the steps, first and noisiest on the left; below it the hint, or the mean.

    Args:
        schedule: What to draw.
        hint: Of a preset, which may merge less on some steps, or nothing.
    """
    left, right, top, bottom = 30, WIDTH - 6, 8, HEIGHT - 16
    points = []
    for index in range(201):
        share = index / 200
        y = bottom - (bottom - top) * schedule(1 - share) / HIGHEST_RATIO
        points.append(f"{left + (right - left) * share:.1f},{y:.1f}")
    lines = []
    for ratio in (0.0, 0.25, 0.5, 0.75):
        y = bottom - (bottom - top) * ratio / HIGHEST_RATIO
        lines.append(_line(left, y, right, y) + _text(left - 4, y + 3, f"{ratio:.0%}", "end"))
    area = f"{left},{bottom} {' '.join(points)} {right},{bottom}"
    where = " of the steps that merge most" if hint else ""
    mean = f"{schedule.mean():.0%} of the tokens merged, on average{where}"
    plot = _svg(
        WIDTH, HEIGHT, mean,
        [
            *lines,
            f'<polygon class="area" points="{area}"/>',
            f'<polyline class="curve" points="{" ".join(points)}"/>',
            _text(left, HEIGHT - 4, "first step: noise"), _text(right, HEIGHT - 4, "last step: picture", "end"),
        ],
    )  # fmt: skip
    return f'{plot}<div class="hint">{escape(hint or mean)}</div>'


def scatter(results: Sequence[Result]) -> str:
    """Speed-up to the right, PSNR upwards: the best are at the upper right. Identical pictures have no point."""
    points = [(result.speedup, result.psnr, result.candidate.name) for result in results if result.psnr is not None]
    left, right, top, bottom = 40, PLOT_WIDTH - 16, 14, PLOT_HEIGHT - 34
    x_ticks = _ticks([1.0, *(x for x, _, _ in points)])
    y_ticks = _ticks([y for _, y, _ in points] or [0.0, 50.0])

    def place(value: float, ticks: Sequence[float], start: float, end: float) -> float:
        return start + (end - start) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    shapes = []
    for tick in x_ticks:
        x = place(tick, x_ticks, left, right)
        shapes.append(_line(x, top, x, bottom) + _text(x, bottom + 14, f"{tick:g}×", "middle"))
    for tick in y_ticks:
        y = place(tick, y_ticks, bottom, top)
        shapes.append(_line(left, y, right, y) + _text(left - 5, y + 3, f"{tick:g}", "end"))
    shapes += [_text(right, PLOT_HEIGHT - 4, "speed-up →", "end"), _text(4, 9, "↑ PSNR, dB")]
    places = [
        (place(speedup, x_ticks, left, right), place(psnr, y_ticks, bottom, top), name)
        for speedup, psnr, name in sorted(points)
    ]
    taken = [(x, x, y) for x, y, _ in places]  # from, to, at which height: the points, and then their names too
    for x, y, name in places:
        beyond = x > right - 90
        start, end = (x - 70, x - 8) if beyond else (x + 8, x + 70)
        free = (
            y + shift
            for shift in (0, 11, -11, 22, -22, 33)
            if not any(start < b + 5 and a - 5 < end and abs(y + shift - at) < 10 for a, b, at in taken)
        )
        label_y = next(free, y)
        taken.append((start, end, label_y))
        shapes.append(f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        shapes.append(_text(end if beyond else start, label_y + 3, name, "end" if beyond else "start", "name"))
    names = "; ".join(f"{name}: {speedup:.2f}×, {psnr:.1f} dB" for speedup, psnr, name in points)
    return _svg(PLOT_WIDTH, PLOT_HEIGHT, f"speed-up against PSNR: {names or 'no points'}", shapes)


def _ticks(values: Sequence[float]) -> list[float]:
    """Three to seven round numbers that enclose the values."""
    least, most = min(values), max(values)
    step = next(
        size * 10.0**power
        for power in range(-2, 4)
        for size in (1, 2, 5)
        if (most - least) / (size * 10.0**power) <= 5
    )
    first = int(least // step) - (least - int(least // step) * step < step * 0.05)
    last = first + 1
    while last * step < most + step * 0.05 or last - first < 2:
        last += 1
    return [round(step * index, 6) for index in range(first, last + 1)]


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: int, label: str, shapes: Sequence[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(shapes)}</svg>"
    )
