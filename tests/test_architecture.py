"""The map of the code names every package."""

from pathlib import Path

import tomesd_plus

PACKAGE = Path(tomesd_plus.__file__).parent
SMALL = {"__init__", "__main__", "version"}


def test_the_map_names_each_package():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    picture = (PACKAGE.parent / "docs" / "architecture.svg").read_text()
    rooms = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    rooms |= {path.name for path in PACKAGE.glob("*.py") if path.stem not in SMALL}
    assert {"merging/", "presets/"} <= rooms
    assert not [room for room in rooms if f"`{room}`" not in page or room not in picture]
