"""The public names: which there are, that each is documented, and that they load when first used."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import tomesd_plus

HEAVY = ("torch", "diffusers", "transformers", "numpy", "matplotlib", "torchmetrics")


def loaded_by(code):
    """The modules that are loaded once the code has run in a process of its own, which must print nothing."""
    listing = "\nimport os, sys\nos.write(3, '\\n'.join(sys.modules).encode())"
    command = f'exec "{sys.executable}" -c "$0" 3>&1 >&2'
    done = subprocess.run(["sh", "-c", command, code + listing], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.splitlines())


def test_star_import_gives_exactly_the_public_names():
    names = {}
    exec("from tomesd_plus import *", names)
    assert set(names) - {"__builtins__"} == set(tomesd_plus.__all__)
    assert set(tomesd_plus.__all__) <= set(dir(tomesd_plus))


@pytest.mark.parametrize("name", tomesd_plus.__all__)
def test_each_public_name_is_there_and_documented(name):
    value = getattr(tomesd_plus, name)
    if name == "PRESETS":  # a mapping: each preset has its description
        assert all(preset.description for preset in value.values())
    else:
        assert len(value.__doc__.split()) > 3 and not value.__doc__.startswith(f"{name}(")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'tomesd_plus' has no attribute 'apply_token_mergers'"):
        tomesd_plus.apply_token_mergers  # noqa: B018
    with pytest.raises(ImportError, match="apply_token_mergers"):
        exec("from tomesd_plus import apply_token_mergers")


def test_the_import_of_the_package_loads_none_of_what_it_needs():
    modules = loaded_by("import tomesd_plus; tomesd_plus.__version__, dir(tomesd_plus)")
    assert "tomesd_plus" in modules and not modules & set(HEAVY)


def test_schedules_need_no_torch():
    modules = loaded_by("from tomesd_plus import CosineSchedule; CosineSchedule(0.5)")
    assert "tomesd_plus.schedules" in modules and not modules & set(HEAVY)


def test_merging_loads_no_pipeline_and_prints_nothing():
    modules = loaded_by("from tomesd_plus import *")
    assert {"torch", "diffusers.models.attention_processor"} <= modules
    assert not [name for name in modules if name.startswith("diffusers.pipelines")]


def test_the_version_is_the_changelog_s_newest_and_has_one_home():
    root = Path(tomesd_plus.__file__).parents[1]
    assert f"\n## {tomesd_plus.__version__}" in (root / "CHANGELOG.md").read_text()
    project = tomllib.loads((root / "pyproject.toml").read_text())
    place, _, name = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    assert getattr(import_module(place), name) == tomesd_plus.__version__ and "version" not in project["project"]
