"""The README's links, which are relative in a clone, made absolute for a package index."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "tomesd_plus" / "version.py").read_text())[1]
SOURCE = re.search(r'^Source = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def absolute(readme: str) -> str:
    """Point links at the tag of this version; pictures at their files."""
    readme = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{SOURCE}/raw/v{VERSION}/", readme)
    return re.sub(r"(\]\()(?!https?:|#)", rf"\1{SOURCE}/blob/v{VERSION}/", readme)


setup(
    long_description=absolute((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
