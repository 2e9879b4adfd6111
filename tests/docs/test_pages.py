"""The README and the site: what must have its place, and what must be as it is drawn."""

import contextlib
import importlib.util
import inspect
import re
import tomllib
import typing
from pathlib import Path

import pytest
import yaml

import tomesd_plus

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s#]+)")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "results/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def test_every_public_name_has_its_place():
    shown = re.findall(r"^::: tomesd_plus\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(tomesd_plus.__all__)


def test_what_public_names_take_and_give_has_its_place_too():
    """But for what no user makes or reads: a model's hooks, and what reports look at."""
    page = (ROOT / "docs" / "api.md").read_text()
    inside = {"Attachment", "FeatureCache", "ModelReport"}
    found = set()
    for each in filter(callable, (getattr(tomesd_plus, name) for name in tomesd_plus.__all__)):
        members = [member for name, member in vars(each).items() if name[0] != "_"] if inspect.isclass(each) else []
        for member in [each, *(getattr(member, "fget", None) or member for member in members)]:
            with contextlib.suppress(NameError, TypeError):  # a name that only a type checker imports; no annotations
                found |= {kind for hint in typing.get_type_hints(member).values() for kind in own_classes(hint)}
    names = {kind.__name__ for kind in found} - inside
    assert {"Costs", "Measured", "StepRecord", "CacheStep"} <= names
    assert not [name for name in names if not re.search(rf"^::: tomesd_plus\.([\w.]+\.)?{name}$", page, re.MULTILINE)]


def own_classes(hint):
    if inspect.isclass(hint) and hint.__module__.startswith("tomesd_plus"):
        yield hint
    for inner in typing.get_args(hint):
        yield from own_classes(inner)


def test_the_readme_is_short_and_its_first_screen_tells_all():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:35])
    assert "![" in first and "```python" in first and "|---|" in first and "does not pay" in first


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_every_example_is_listed():
    page = (ROOT / "docs" / "examples.md").read_text()
    names = {path.name for path in (ROOT / "examples").glob("*.py")} - {"__init__.py"}
    assert not [name for name in names if f"`{name}`" not in page]


def test_every_short_example_has_its_picture_or_what_it_prints():
    page = (ROOT / "docs" / "examples.md").read_text()
    short, table = page.split("## Those that made a table")
    for path in (ROOT / "examples").glob("*.py"):
        if 0 < len(path.read_text().splitlines()) < 40 and f"`{path.name}`" not in table and "pruna" not in path.name:
            after = short[short.index(f"[`{path.name}`]") :].split("\n[`")[0]
            assert "](pictures/" in after or "```text" in after, path.name


def test_the_table_of_pipelines_has_its_notes_and_counts_its_cells():
    page = (ROOT / "docs" / "pipelines.md").read_text()
    rows, notes = page.split("## Notes")
    cells = [cell.strip() for line in rows.splitlines() if line.startswith("| ") for cell in line.split("|")[2:-1]]
    numbers = {int(each) for cell in cells for each in re.findall(r"\[(\d+)\]", cell)}
    assert sorted(numbers) == [int(each) for each in re.findall(r"^(\d+)\. ", notes, re.MULTILINE)]
    total, *counts = map(int, re.findall(r"\d+", page[page.index("In all ") :]))
    assert total == sum(counts) and counts[0] == cells.count("✓") > 100


def test_every_option_of_merging_and_caches_is_listed():
    page = (ROOT / "docs" / "options.md").read_text()
    fields = [*tomesd_plus.ToMeConfig.__dataclass_fields__, *tomesd_plus.FeatureCacheConfig.__dataclass_fields__]
    assert "ratio" in fields and not [name for name in fields if f"| `{name}` |" not in page]


def test_addresses_and_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == project["urls"]["Source"] and citation["license"] == project["license"]
    assert citation["version"] == tomesd_plus.__version__
    assert all(url.startswith("https://") for url in project["urls"].values())


def test_the_page_of_a_package_index_has_absolute_links():
    text = (ROOT / "setup.py").read_text()
    names = {"__file__": str(ROOT / "setup.py"), "setup": lambda **_: None}
    exec(text.replace("from setuptools import setup\n", ""), names)
    page = names["absolute"]("![a](docs/x.png) [b](docs/y.md) [c](https://z) [d](#e)")
    source = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
    tag = f"v{tomesd_plus.__version__}"
    assert page == f"![a]({source}/raw/{tag}/docs/x.png) [b]({source}/blob/{tag}/docs/y.md) [c](https://z) [d](#e)"


def test_tables_are_as_their_data_says():
    spec = importlib.util.spec_from_file_location("draw_tables", ROOT / "docs" / "draw_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    row = {"solver": "DDIMScheduler", "steps": "25", "speed-up": "1.789", "PSNR dB": "50.06", "PSNR dB of these": "45"}
    rows = [row | {"preset": "quality", "below": ""}, row | {"preset": "fast", "below": "miss"}]
    drawn = tables.table(rows, [("DDIMScheduler", 25)])
    assert drawn.splitlines()[-1] == "| DDIM, 25 | 1.79× | **50.1** | 45.0 | 1.79× | 50.1 | 45.0 |"
    for name, wanted in tables.TABLES.items():
        text = (ROOT / name).read_text()
        assert tables.MARKED.search(text)
        if tables.DATA.exists():
            assert tables.filled(text, wanted) == text, "make tables"
