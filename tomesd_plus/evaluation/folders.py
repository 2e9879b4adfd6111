"""Which files of a folder are pictures, and why the others are not."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from tomesd_plus.evaluation.pixels import suffixes


@dataclass
class Listing:
    """The pictures in a folder, by name and kind of file alone: none has been opened.

    Args:
        paths: Files with a picture's suffix, sorted.
        skipped: Number of other entries, by reason.
    """

    paths: list[Path] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        """Count an entry that is left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def list_pictures(folder: Path) -> Listing:
    """List the pictures in a folder and its subfolders.

    Hidden files and folders are skipped. Symbolic links are followed, but nothing is listed twice: a link to what is
    listed already is skipped, so links may form loops. What is no link is listed first.

    Args:
        folder: It may itself be hidden or a link.
    """
    listing, known = Listing(), suffixes()
    seen = {os.path.realpath(folder)}
    folders, links = [Path(folder)], list[Path]()
    while folders or links:
        is_link = not folders
        for entry in [links.pop(0)] if is_link else _entries(folders.pop(), listing):
            if entry.name.startswith("."):
                listing.skip("hidden")
            elif entry.is_symlink() and not is_link:
                links.append(entry)
            elif (target := os.path.realpath(entry)) in seen:
                listing.skip("listed already, by another link")
            elif not os.path.exists(target):
                listing.skip("a link to nothing")
            else:
                seen.add(target)
                _take(entry, folders, listing, known)
    listing.paths.sort()
    return listing


def _entries(folder: Path, listing: Listing) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # no permission, or removed meanwhile
        listing.skip("a folder that cannot be read")
        return []


def _take(entry: Path, folders: list[Path], listing: Listing, known: dict[str, str]) -> None:
    if entry.is_dir():
        folders.append(entry)
    elif not entry.is_file():  # reading from a pipe would never end
        listing.skip("neither a file nor a folder")
    elif entry.suffix.lower() not in known:
        listing.skip("no picture by its suffix")
    elif not entry.stat().st_size:
        listing.skip("an empty file")
    else:
        listing.paths.append(entry)
