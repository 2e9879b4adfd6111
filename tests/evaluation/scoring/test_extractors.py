"""From images on the disk to features, one batch at a time."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.images import Images
from tomesd_plus.evaluation.scoring import load_extractor
from tomesd_plus.evaluation.scoring.estimates import distance_names
from tomesd_plus.evaluation.scoring.extractors import extract


class MeanColour:
    """An extractor that is easy to check; remembers its batches."""

    name, dimensions, batch_size = "mean colour", 3, 4

    def __init__(self):
        self.batches = []

    def of_images(self, images):
        self.batches.append(tuple(images.shape))
        return images.float().mean(dim=(2, 3))


def save(path, colour, size=(8, 8), mode="RGB"):
    Image.new("RGB", size, colour).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "below").mkdir(parents=True)
    for index in range(10):
        save(tmp_path / "images" / f"{index}.png", (index, 0, 0))
    return tmp_path / "images"


def test_features_come_in_order_and_a_batch_at_a_time(folder, tmp_path):
    extractor, done = MeanColour(), []
    features, kept = extract(extractor, Images.of_folder(folder), tmp_path / "f.npy", done.append)
    assert kept == list(range(10)) and features[:, 0].tolist() == kept
    assert extractor.batches == [(4, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)] and sum(done) == 10
    assert isinstance(features, np.memmap)


def test_broken_images_are_counted_and_left_out(folder, tmp_path):
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[:-30])
    (folder / "5.png").write_text("not an image")
    (folder / "7.png").write_bytes(b"")
    images = Images.of_folder(folder)
    features, _ = extract(MeanColour(), images, tmp_path / "f.npy")
    assert features[:, 0].tolist() == [0, 1, 2, 4, 6, 8, 9]
    assert [name[-5:] for name in images.unreadable] == ["3.png", "5.png"]
    assert images.skipped == {
        "damaged, truncated or not decoded by Pillow": 1, "no picture in a format that is read": 1, "an empty file": 1,
    }  # fmt: skip


def test_large_images_come_in_smaller_batches(folder, monkeypatch):
    monkeypatch.setattr("tomesd_plus.evaluation.images.BATCH_BYTES", 3 * 3 * 8 * 8)
    assert [len(indices) for indices, _ in Images.of_folder(folder).batches(64)] == [3, 3, 3, 1]


def test_sizes_modes_and_folders_may_be_mixed(folder, tmp_path):
    save(folder / "2.png", (2, 2, 2), (16, 4))
    save(folder / "4.png", (4, 4, 4), mode="L")
    save(folder / "below" / "99.jpg", (200, 0, 0))
    features, kept = extract(MeanColour(), Images.of_folder(folder), tmp_path / "f.npy")
    assert kept == list(range(11))
    assert features[:10, 0].tolist() == list(range(10)) and features[10, 0] > 190


def test_the_embedded_clip_gives_unit_features_whatever_the_batch():
    clip = load_extractor("tiny")
    images = torch.randint(0, 256, (5, 3, 40, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = clip.of_images(images)
    assert features.shape == (5, clip.dimensions) and torch.allclose(features.norm(dim=1), torch.ones(5))
    clip.batch_size = 2
    assert torch.allclose(clip.of_images(images), features, atol=1e-5)
    long = ["a large dog on a blue background", "a very long " + "text " * 200]
    texts = clip.of_texts(long)
    assert texts.shape == (2, clip.dimensions)
    clip.tokenizer.model_max_length = 10**30  # as where the folder does not tell
    assert torch.equal(clip.of_texts(long), texts)
    with pytest.raises(ValueError, match="uint8"):
        clip.of_images(images.float())


def test_the_embedded_clip_tells_colours_apart():
    clip = load_extractor("tiny")
    red = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    red[:, 0] = 220
    blue = red.flip(1)
    texts = clip.of_texts([f"a large star on a {colour} background" for colour in ("red", "blue")])
    scores = clip.of_images(torch.cat([red, blue])) @ texts.T
    assert scores[0, 0] > scores[0, 1] and scores[1, 1] > scores[1, 0]


def test_only_distances_over_inception_are_called_fid(monkeypatch):
    assert list(distance_names(load_extractor("tiny"))) == [
        "Fréchet distance (tiny CLIP)", "kernel distance (tiny CLIP)", "CMMD (tiny CLIP)",
    ]  # fmt: skip
    fake_inception(monkeypatch)
    assert list(distance_names(load_extractor("inception"))) == ["FID", "KID"]


def fake_inception(monkeypatch, error=None):
    class Network(torch.nn.Module):
        def __init__(self, name, features_list, weights):
            super().__init__()
            assert (name, features_list) == ("inception-v3-compat", ["2048"])
            if error:
                raise error

        def forward(self, images):
            assert images.dtype == torch.uint8 and not self.training
            return (images.float().mean(dim=(1, 2, 3))[:, None].expand(-1, 2048),)

    module = SimpleNamespace(FeatureExtractorInceptionV3=Network)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


def test_inception_is_torch_fidelitys(monkeypatch):
    fake_inception(monkeypatch)
    features = load_extractor("inception").of_images(torch.full((2, 3, 8, 8), 7, dtype=torch.uint8))
    assert features.shape == (2, 2048) and (features == 7).all()


def test_missing_weights_and_libraries_are_said(monkeypatch, tmp_path):
    with pytest.raises(EvaluationError, match="no file"):
        load_extractor("inception", inception_weights=str(tmp_path / "none.pth"))
    with pytest.raises(EvaluationError, match="no/such-clip"):
        load_extractor("no/such-clip")
    fake_inception(monkeypatch, OSError("no route to host"))
    with pytest.raises(EvaluationError, match=r"no route to host.*--inception-weights"):
        load_extractor("inception")
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(EvaluationError, match="pip install torch-fidelity"):
        load_extractor("inception")


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """No more images are open at a time than a batch holds; features lie on the disk."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images, alive = Images.of_paths([tmp_path / "a.png"] * 100), []

    class Watching(SimpleNamespace):
        def of_images(self, batch):
            alive.append(len(batch))
            return torch.zeros(len(batch), 2)

    features, kept = extract(Watching(name="w", dimensions=2, batch_size=7), images, tmp_path / "f.npy")
    assert max(alive) == 7 and sum(alive) == len(kept) == 100 and isinstance(features, np.memmap)
