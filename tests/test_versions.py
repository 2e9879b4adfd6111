"""The oldest supported versions are those that `make test-oldest` installs."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
UNTESTED = {"torch"}  # old ones can be had from PyPI with gigabytes of CUDA only


def test_the_oldest_constraints_are_the_floors():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["app"]]
    oldest = dict(
        line.split("==") for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if "==" in line
    )
    for requirement in map(Requirement, lines):
        (floor,) = [each.version for each in requirement.specifier if each.operator == ">="]
        pinned = oldest[requirement.name]
        assert Version(pinned) in requirement.specifier
        if requirement.name not in UNTESTED:  # the same release, as precise as the floor is
            places = Version(floor).release
            padded = (*Version(pinned).release, 0, 0)
            assert padded[: len(places)] == places, (requirement.name, floor, pinned)


def test_the_newest_constraints_are_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    newest = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for requirement in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]]):
        if requirement.name in newest:
            assert Version(newest[requirement.name]) in requirement.specifier, requirement


def test_the_workflow_runs_both():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert ".ci/run" in workflow and "make test-oldest" in workflow
    makefile = (ROOT / "Makefile").read_text()
    assert "VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt" in makefile
