"""Draw the packages and their imports, read off the code: writes ``docs/architecture.svg``, prints lines of code."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import grimp
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[1]
PACKAGE, APP = "tomesd_plus", "gradio_app"
LEFT_OUT = {"__main__", "version"}  # a few lines each
WIDTH, HEIGHT = 1.7, 0.62  # of a box, where rows and boxes in a row are GAP apart
GAP = 2.0, 1.15
SWEEPS = 8
COLOUR, APP_COLOUR = "#e8f1f2", "#fdf0e0"

Imports = Mapping[str, set[str]]


def room_of(module: str) -> str:
    """The package, or single file, that a module belongs to: ``tomesd_plus.merging.apply`` to ``merging``."""
    names = module.split(".")
    return "" if names == [PACKAGE] else names[0] if names[0] != PACKAGE else names[1]


def imports_between_rooms() -> dict[str, set[str]]:
    """Which rooms each room imports from."""
    graph = grimp.build_graph(PACKAGE, APP, cache_dir=None)
    modules = {module for module in graph.modules if room_of(module) not in LEFT_OUT | {""}}
    imports: dict[str, set[str]] = {room_of(module): set() for module in modules}
    for module in modules:
        for imported in graph.find_modules_directly_imported_by(module):
            room = room_of(imported)
            if room in imports and room != room_of(module):
                imports[room_of(module)].add(room)
    return imports


def without_shortcuts(imports: Imports) -> dict[str, set[str]]:
    """Leave out an import where a longer way leads to the same room, so that the picture can be read."""
    reached: dict[str, set[str]] = {}

    def reach(room: str) -> set[str]:
        if room not in reached:
            reached[room] = imports[room].union(*(reach(other) for other in imports[room]))
        return reached[room]

    return {
        room: {one for one in others if not any(one in reach(other) for other in others - {one})}
        for room, others in imports.items()
    }


def places(imports: Imports) -> dict[str, tuple[float, float]]:
    """Where each room's box stands: right below all that import it, and near to them."""
    importers = {room: {other for other in imports if room in imports[other]} for room in imports}
    near = {room: imports[room] | importers[room] for room in imports}
    floors: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in floors:
            floors[room] = min((floor(other) for other in importers[room]), default=0) - 1
        return floors[room]

    rows: dict[int, list[str]] = {}
    for room in sorted(imports):
        rows.setdefault(floor(room), []).append(room)
    x: dict[str, float] = {}
    for _ in range(SWEEPS):  # each room towards the mean of its neighbours
        for row in rows.values():
            row.sort(key=lambda room: mean([x.get(other, 0.0) for other in sorted(near[room])] or [0.0]))
            x |= {room: index - (len(row) - 1) / 2 for index, room in enumerate(row)}
    return {room: (GAP[0] * x[room], GAP[1] * floors[room]) for room in imports}


def size_of(room: str) -> tuple[int, int]:
    """Python files and their lines."""
    path = ROOT / room if room == APP else ROOT / PACKAGE / room
    files = [*path.rglob("*.py")] if path.is_dir() else [path.with_suffix(".py")]
    return len(files), sum(len(file.read_text().splitlines()) for file in files)


def draw(axes: Axes, imports: Imports) -> None:
    """A box for each room, and an arrow to each that it imports from."""
    at = places(imports)
    for room, (x, y) in sorted(at.items()):
        files, lines = size_of(room)
        title = f"{room}/" if (ROOT / PACKAGE / room).is_dir() or room == APP else f"{room}.py"
        axes.text(x, y + 0.11, title, ha="center", va="center", weight="bold", size=10, zorder=3)
        about = f"{files} files, {lines:,} lines" if files > 1 else f"{lines:,} lines"
        axes.text(x, y - 0.14, about, ha="center", va="center", size=8, color="#444444", zorder=3)
        box = FancyBboxPatch((x - WIDTH / 2, y - HEIGHT / 2), WIDTH, HEIGHT, "round,pad=0,rounding_size=0.08")
        box.set(facecolor=APP_COLOUR if room == APP else COLOUR, edgecolor="#1f6f78", zorder=2)
        axes.add_patch(box)
        for other in sorted(imports[room]):
            to_x, to_y = at[other]
            lean = max(-0.6, min(0.6, (to_x - x) / 4))  # arrows leave and arrive towards each other
            start, end = (x + lean, y - HEIGHT / 2), (to_x - lean, to_y + HEIGHT / 2)
            style = {"arrowstyle": "-|>", "color": "#8a8a8a", "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", end, start, arrowprops=style, zorder=1)
    xs, ys = zip(*at.values())
    axes.set_xlim(min(xs) - WIDTH / 2 - 0.1, max(xs) + WIDTH / 2 + 0.1)
    axes.set_ylim(min(ys) - HEIGHT / 2 - 0.1, max(ys) + HEIGHT / 2 + 0.1)
    axes.axis("off")


def main() -> None:
    """Draw, and print the table."""
    imports = imports_between_rooms()
    figure = Figure(figsize=(9, 7), layout="constrained")
    draw(figure.subplots(), without_shortcuts(imports))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": PACKAGE}):  # text as text; the same bytes each time
        figure.savefig(ROOT / "docs" / "architecture.svg", metadata={"Date": None})
    sizes = {room: size_of(room) for room in sorted(imports, key=lambda room: -size_of(room)[1])}
    print("| room | files | lines | imports from |\n|---|---:|---:|---|")
    for room, (files, lines) in sizes.items():
        print(f"| {room} | {files} | {lines:,} | {', '.join(sorted(imports[room]))} |")
    print(f"| all | {sum(f for f, _ in sizes.values())} | {sum(n for _, n in sizes.values()):,} | |")


if __name__ == "__main__":
    main()
