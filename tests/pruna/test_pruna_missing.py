"""Importing the plug-in where Pruna is missing or too old; runs with and without Pruna."""

import importlib.metadata
import sys

import pytest


@pytest.fixture
def unloaded(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("tomesd_plus.integrations")]:
        monkeypatch.delitem(sys.modules, name)


def _missing(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_pruna_is_missing(monkeypatch, unloaded):
    monkeypatch.setattr(importlib.metadata, "version", _missing)
    with pytest.raises(ImportError, match=r"which is not installed: pip install 'pruna>=0\.3\.4'"):
        import tomesd_plus.integrations.pruna  # noqa: F401


@pytest.mark.parametrize("found", ["0.2.10", "0.3.3", "0.3", "0.3.3.post1"])
def test_pruna_is_too_old(monkeypatch, unloaded, found):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf"needs Pruna 0\.3\.4 or later, and {found} is installed: pip install -U"):
        import tomesd_plus.integrations.pruna  # noqa: F401
