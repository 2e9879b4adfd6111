"""Which files of a folder are pictures: hidden ones, links, pipes and odd names."""

import os

import pytest
from PIL import Image

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.folders import list_pictures
from tomesd_plus.evaluation.images import Images
from tomesd_plus.evaluation.scoring.reference import reference_version
from tomesd_plus.evaluation.words import printable


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (9, 9, 9)).save(path, "PNG")
    return path


def names(folder):
    return [str(path.relative_to(folder)) for path in list_pictures(folder).paths]


def test_pictures_in_subfolders_are_sorted_and_all_else_is_counted(tmp_path):
    for name in ("b.png", "a.PNG", "below/c.jpg", "below/again/d.webp", "e.tif"):
        picture(tmp_path / name)
    (tmp_path / "captions.txt").write_text("a cat")
    (tmp_path / "photo.heic").write_bytes(b"x")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    assert names(tmp_path) == ["a.PNG", "b.png", "below/again/d.webp", "below/c.jpg", "e.tif"]
    assert list_pictures(tmp_path).skipped == {"no picture by its suffix": 2, "an empty file": 1}


def test_hidden_files_and_folders_are_skipped(tmp_path):
    folder = tmp_path / ".cache" / "reference"  # the folder that is asked for may be hidden itself
    picture(folder / "a.png")
    for name in (".b.png", ".trash/c.png", "below/.d/e.png", "__MACOSX/._a.png"):
        picture(folder / name)
    assert names(folder) == ["a.png"] and list_pictures(folder).skipped == {"hidden": 4}
    with pytest.raises(EvaluationError, match=r"holds no images.*Skipped: 1 × hidden"):
        Images.of_folder(folder / "__MACOSX")


def test_links_are_followed_once(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    picture(folder / "real.png")
    picture(elsewhere / "b.png")
    picture(elsewhere / "below" / "c.png")
    links = {
        "0loop": folder, "to": elsewhere, "again": elsewhere, "deeper": elsewhere / "below",
        "0.png": folder / "real.png", "one.png": picture(tmp_path / "one"), "two.png": tmp_path / "one",
        "nothing.png": tmp_path / "nothing", "self.png": folder / "self.png",
    }  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (elsewhere / "back").symlink_to(folder)
    (elsewhere / "up").symlink_to("..")
    listed = list_pictures(folder)
    assert len(listed.paths) == len({path.resolve() for path in listed.paths}) == 4
    assert folder / "real.png" in listed.paths
    assert listed.skipped["a link to nothing"] == 2 and listed.skipped["listed already, by another link"] >= 5
    assert names(folder) == [str(path.relative_to(folder)) for path in listed.paths]  # the same each time
    assert len(list_pictures(folder / "to").paths) >= 2  # a link is as good as its folder


def test_a_link_to_what_is_above_does_not_list_it_twice(tmp_path):
    picture(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    picture(tmp_path / "b" / "y.png")
    assert sorted(path.name for path in list_pictures(tmp_path / "a").paths) == ["x.png", "y.png"]


def test_pipes_do_not_block(tmp_path):
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert names(tmp_path) == ["a.png"] and list_pictures(tmp_path).skipped == {"neither a file nor a folder": 1}


def test_folders_that_cannot_be_read_are_counted(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    picture(tmp_path / "locked" / "b.png")
    listing = type(tmp_path).iterdir

    def iterdir(path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(type(tmp_path), "iterdir", iterdir)
    assert names(tmp_path) == ["a.png"] and list_pictures(tmp_path).skipped == {"a folder that cannot be read": 1}


ODD = [
    "two\nlines.png",
    "a b%s%d.png",
    "[red]x[/red].png",
    "|a|.png",
    "\u202e.png",
    os.fsdecode(b"\xff\xfe.png"),
    "-.png",
    "é.png",
]


def test_odd_names(tmp_path):
    for name in ODD:
        picture(tmp_path / name)
    images = Images.of_folder(tmp_path)
    assert len(images) == len(ODD) and all(images.read(index) is not None for index in range(len(ODD)))
    assert len(reference_version(str(tmp_path))) == 16
    for name in ODD:
        shown = printable(name)
        assert shown.isprintable() and shown.encode() and ("\\" in shown) == (not name.isprintable())
