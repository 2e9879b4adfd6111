"""Draw the table of pipelines from the results of its tests: runs them and writes ``docs/pipelines.md``."""

import sys
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER, PAGE = ROOT / "tests" / "pipelines", ROOT / "docs" / "pipelines.md"
WAYS = ("merging", "bare", "cache", "skipping", "preset", "drop-in")
HOSTS = ("diffusers", "transformers", "torch", "peft")
HEAD = """\
# Which pipelines and add-ons work

*Made from the results of `tests/pipelines/` by `make pipelines`, with {versions}.*

Each cell is a test on a tiny pipeline of the real class with random weights, so it says that something works, not how
good its pictures are. ✓ means: tokens were merged, or steps were cached; at a ratio of 0 (of a cache: an interval of
1; a preset has none) and after removal the picture is bit for bit the untouched one; the same seed gives the same
picture on the first and the second call, but for the drop-in, which draws anew, as tomesd does; and no warning came.

- **merging**: `apply_token_merging(pipe, ratio=0.5)`;
- **bare**: `pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5))`;
- **cache**: `apply_feature_cache(pipe, interval=2)`;
- **skipping**: `apply_feature_cache(pipe, interval=2, branch="nothing")`;
- **preset**: `apply_preset(pipe, "fast")`, with `force=True` as there are few steps;
- **drop-in**: `tomesd_plus.tomesd.apply_patch(pipe, ratio=0.5)`.

Numbers in brackets lead to the notes at the end. *Refused*: with an error in these words, and nothing has changed.
*Left alone*: the untouched picture, with a warning in these words. *In part*: likewise, after it did its work in an
earlier part of the pipeline's. *n/a*: the host itself does not run it. A blank cell was not tried.
"""


class Results:
    """Takes the outcome of each cell from a run of pytest."""

    def __init__(self) -> None:
        self.titles: dict[str, str] = {}
        self.cells: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)  # by file, by row and column
        self.failed = False

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """The files' titles are their docstrings."""
        for item in items:
            module = item.getparent(pytest.Module)
            if module is not None and module.obj.__doc__:
                self.titles[item.nodeid.partition("::")[0]] = module.obj.__doc__.strip().rstrip(".")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Each phase of a test."""
        file, _, test = report.nodeid.partition("::")
        self.failed |= report.failed
        if not test.startswith("test_cell[") or (report.when != "call" and not report.skipped):
            return
        row, _, way = test.removeprefix("test_cell[").removesuffix("]").rpartition(": ")
        row = row.encode("ascii", "backslashreplace").decode("unicode_escape")  # as pytest writes other letters
        self.cells[file][row, way] = outcome(report)


def outcome(report: pytest.TestReport) -> str:
    """What a cell says: ✓, or words."""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        return f"n/a: {reason.removeprefix('Skipped: ')}"
    if report.failed:
        return "fails"
    words = str(dict(report.user_properties).get("outcome", "works"))
    return "✓" if words == "works" else words


def table(cells: Mapping[tuple[str, str], str], notes: list[str]) -> list[str]:
    """A file's rows. Words go to the notes, which are added to."""
    ways = [way for way in WAYS if any(one == way for _, one in cells)]
    lines = [f"| | {' | '.join(ways)} |", f"|---|{':-:|' * len(ways)}"]
    for row in dict.fromkeys(row for row, _ in cells):
        shown = []
        for way in ways:
            kind, _, words = cells.get((row, way), "").partition(": ")
            if words and words not in notes:
                notes.append(words)
            shown.append(f"{kind} [{notes.index(words) + 1}]" if words else kind)
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return lines


def page(results: Results) -> str:
    """The whole page."""
    notes: list[str] = []
    lines = [HEAD.format(versions=", ".join(f"{name} {version(name).partition('+')[0]}" for name in HOSTS))]
    for file, cells in sorted(results.cells.items(), key=lambda item: ("text_to_image" not in item[0], item[0])):
        lines += [f"## {results.titles[file]}", "", *table(cells, notes), ""]
    lines += ["## Notes", ""] + [f"{index}. {words}" for index, words in enumerate(notes, 1)]
    counts: dict[str, int] = defaultdict(int)
    for cells in results.cells.values():
        for words in cells.values():
            counts[words.partition(": ")[0]] += 1
    total = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda item: -item[1]))
    lines += ["", f"In all {sum(counts.values())} cells: {total}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the tests and write the page; the exit code is 1 if a test fails, and then nothing is written."""
    results = Results()
    pytest.main([str(FOLDER), "-q", "-k", "test_cell", "-p", "no:cacheprovider"], plugins=[results])
    if results.failed or not results.cells:
        print(f"{PAGE.name} is left as it was: a test failed", file=sys.stderr)
        return 1
    PAGE.write_text(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
