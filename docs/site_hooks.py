"""Hooks of MkDocs: files outside ``docs/`` that its pages link to become a part of the site, and so do their links."""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ALWAYS = ["CONTRIBUTING.md", "CHANGELOG.md", "results/README.md", "tomesd_plus/assets/tiny_pipeline/README.md"]
OPTIONAL = "pruna.md"  # a page that is there with the plug-in
SOURCES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".txt": "text"}  # shown as pages
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=[)\s])")
# How docstrings refer to names.
ROLE = re.compile(r":(?:class|func|meth|data|attr|mod):<code>~?(?P<name>[\w.]+)</code>")
PACKAGE = "tomesd_plus."


def on_config(config: Any) -> Any:
    """Leave the optional page out where it is missing."""
    if not (ROOT / "docs" / OPTIONAL).exists():
        for section in (part for entry in config["nav"] for part in entry.values() if isinstance(part, list)):
            section[:] = [entry for entry in section if OPTIONAL not in entry.values()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to, and what that links to."""
    waiting = [f"docs/{file.src_uri}" for file in files if file.is_documentation_page()] + ALWAYS
    seen = set(waiting)
    for path in waiting:
        if not path.startswith("docs/"):
            files.append(_file(path, config))
        if path.endswith(".md"):
            linked = {target for target in _targets(path) if (ROOT / target).is_file()}
            waiting += sorted(new for new in linked - seen if not new.startswith("docs/"))
            seen |= linked
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at where their files are on the site."""
    path = _repository_path(page.file.src_uri)
    if not path.endswith(".md"):
        return markdown  # a source

    def moved(link: re.Match[str]) -> str:
        target = _resolved(path, link["target"])
        if target is None or not (ROOT / target).is_file():
            return link[0]  # another site's, or missing: MkDocs tells
        there = posixpath.relpath(_site_path(target), posixpath.dirname(page.file.src_uri) or ".")
        return there + (link["anchor"] or "")

    return LINK.sub(moved, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Make links of docstrings' references to public names."""

    def linked(role: re.Match[str]) -> str:
        name = role["name"].removeprefix(PACKAGE)
        return f'<autoref identifier="{PACKAGE}{name}" optional><code>{name}</code></autoref>'

    return ROLE.sub(linked, html).replace("::</p>", ":</p>")


def _targets(path: str) -> Iterator[str]:
    for link in LINK.finditer((ROOT / path).read_text(encoding="utf-8")):
        target = _resolved(path, link["target"])
        if target is not None:
            yield target


def _resolved(path: str, target: str) -> str | None:
    """A link's target as a path in the repository; ``None`` if it leads out of it."""
    if ":" in target or target.startswith("/"):
        return None
    resolved = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return None if resolved.startswith("..") else resolved


def _site_path(path: str) -> str:
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{path}.md" if Path(path).suffix in SOURCES else path


def _repository_path(uri: str) -> str:
    if (ROOT / "docs" / uri).exists():
        return f"docs/{uri}"
    return uri if (ROOT / uri).exists() else uri.removesuffix(".md")


def _file(path: str, config: Any) -> File:
    language = SOURCES.get(Path(path).suffix)
    if language is None:
        return File.generated(config, path, abs_src_path=str(ROOT / path))
    text = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
    page = f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n````{language}\n{text}\n````\n"
    return File.generated(config, _site_path(path), content=page)
