"""The page of the docs has each cell that the tests have, and no other."""

import importlib
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "pipelines.md"


def shown():
    """(row, column) of all cells of the page that say something."""
    cells, ways = set(), []
    for line in PAGE.read_text().splitlines():
        if line.startswith("| | "):
            ways = [way.strip() for way in line.split("|")[2:-1]]
        elif line.startswith("| "):
            row, *values = [cell.strip() for cell in line.split("|")[1:-1]]
            cells |= {(row, way) for way, value in zip(ways, values, strict=True) if value}
    return cells


@pytest.mark.skipif(f"diffusers {version('diffusers')}" not in PAGE.read_text(), reason="the page is of another host")
def test_the_page_is_of_these_tests():
    modules = [
        importlib.import_module(path.stem)
        for path in sorted(HERE.glob("test_pipelines_*.py"))
        if path.stem != Path(__file__).stem
    ]
    expected = [(row.name, way) for module in modules for row in module.ROWS for way in row.ways]
    assert len(expected) == len(set(expected)) > 100, "two rows have one name"
    assert shown() == set(expected), "make pipelines"


def test_nothing_on_the_page_fails():
    assert "| fails" not in PAGE.read_text()
