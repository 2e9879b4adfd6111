"""The embedded pipeline: real, offline, small, and merging works on it."""

import csv
import stat
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
import transformers
from conftest import generate
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from tomesd_plus import apply_token_merging, load_tiny_pipeline
from tomesd_plus.evaluation.scoring.reference import load_statistics
from tomesd_plus.metrics import ClipFeatures, Statistics
from tomesd_plus.tiny import ASSETS, TINY_CLIP, TINY_REFERENCE, held_out_captions


@pytest.fixture(scope="module")
def tiny():
    pipe = load_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_a_real_pipeline_of_the_promised_shape(tiny):
    assert type(tiny) is StableDiffusionPipeline
    assert isinstance(tiny.unet, UNet2DConditionModel) and isinstance(tiny.vae, AutoencoderKL)
    assert isinstance(tiny.text_encoder, CLIPTextModel) and isinstance(tiny.tokenizer, CLIPTokenizer)
    assert tiny.unet.config.sample_size == 32 and len(tiny.unet.config.block_out_channels) == 3
    report = apply_token_merging(tiny, ratio=0.5, max_downsample=4)
    generate(tiny, height=64, width=64)
    assert report.removed == {1: 0.5, 2: 0.5, 4: 0.5}
    assert {layer.tokens // layer.calls for layer in report.layers if layer.downsample == 1} == {1024}
    from tomesd_plus import remove_token_merging

    remove_token_merging(tiny)


def test_its_files_are_small_and_readable_by_all():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert 1e6 < sum(path.stat().st_size for path in files) < 40e6
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in files)
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 4  # UNet, VAE, text encoder, CLIP
    for path in weights:
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}


def test_dtype_can_be_chosen():
    assert load_tiny_pipeline(dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_words_of_its_captions_are_single_tokens(tiny):
    words = ["a", "large", "red", "apple", "on", "a", "blue", "striped", "background"]
    assert len(tiny.tokenizer.tokenize(" ".join(words))) == len(words)
    assert tiny.tokenizer.unk_token_id not in tiny.tokenizer("zebra ünï 3").input_ids[1:-1]


def test_backgrounds_have_the_colour_that_was_asked_for(tiny):
    data = pytest.importorskip("examples.train_tiny.data")
    wanted = ["red", "green", "blue", "yellow", "purple", "white"]
    prompts = [f"a large star on a {color} background" for color in wanted]
    pictures = generate(tiny, prompt=prompts, height=64, width=64, num_inference_steps=12, guidance_scale=4.0)
    palette = torch.tensor(list(data.COLORS.values())) / 255
    for color, picture in zip(wanted, pictures):
        corners = torch.stack([picture[:, y, x] for y in (2, -3) for x in (2, -3)]).median(dim=0).values
        assert list(data.COLORS)[(palette - corners).norm(dim=1).argmin()] == color


def test_merging_keeps_the_picture_and_merges(tiny):
    from tomesd_plus import token_merging

    def picture():
        return generate(tiny, prompt="a large star on a blue background", height=64, width=64, num_inference_steps=10)

    plain = picture()
    floor = (generate(tiny, seed=9, prompt="a large star on a blue background", height=64, width=64,
                      num_inference_steps=10) - plain).square().mean()  # fmt: skip
    with token_merging(tiny, ratio=0.5) as report:
        error = (picture() - plain).square().mean()
    assert report.removed[1] == 0.5 and 0 < error < floor / 10
    assert torch.equal(picture(), plain)


# The CLIP model and the reference ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    return ClipFeatures.load(TINY_CLIP)


@pytest.fixture(scope="module")
def check():
    """The check of the embedded pipeline, which draws real pictures."""
    data = pytest.importorskip("examples.train_tiny.data")
    if not any(path.exists() for path in data.FONT_PATHS):
        pytest.skip("Noto Color Emoji is missing: apt-get install fonts-noto-color-emoji")
    return pytest.importorskip("examples.train_tiny.check")


def test_the_text_encoder_is_that_of_the_clip_model(tiny, clip):
    mine = dict(tiny.text_encoder.named_parameters())
    theirs = {name.removeprefix("text_model."): p for name, p in clip.model.text_model.named_parameters()}
    assert len(theirs) > 20
    for name, parameter in mine.items():
        assert torch.equal(parameter, theirs[name.removeprefix("text_model.")]), name


def test_the_clip_model_recognizes_real_pictures_of_unseen_captions(clip, check):
    scenes = check.embedded_scenes()[:100]
    features = clip.of_images(check.to_uint8(check.picture_batch(scenes, 64, 5)))
    colors, objects = check.zero_shot(clip, features, scenes)
    assert check.share(colors, 1) >= 0.99 and check.share(objects, 5) >= 0.95
    shuffled, _ = check.zero_shot(clip, features.roll(1, dims=0), scenes)
    assert check.share(shuffled, 1) < 0.5


def test_the_reference_is_of_held_out_pictures(clip, check):
    with np.load(TINY_REFERENCE) as file:
        features, count = torch.from_numpy(file["features"]), int(file["count"])
    assert features.shape == (2000, 64) and count == 2000
    stored, again = load_statistics(TINY_REFERENCE), Statistics.of(features)
    assert torch.allclose(stored.mean, again.mean, atol=1e-4)
    assert torch.allclose(stored.covariance, again.covariance, atol=1e-4)
    first = check.held_out_scenes(2000)[:8]
    drawn = clip.of_images(check.to_uint8(check.picture_batch(first, 64, check.REFERENCE_SEED)))
    assert (drawn * features[:8].float()).sum(dim=-1).min() > 0.999
    other = clip.of_images(
        check.to_uint8(check.picture_batch(check.held_out_scenes(2000)[8:16], 64, check.REFERENCE_SEED))
    )
    assert (other * features[:8].float()).sum(dim=-1).min() < 0.9


def test_captions_are_many_different_and_held_out(check):
    captions = held_out_captions()
    assert len(captions) == len(set(captions)) == 500
    assert all(scene.held_out for scene in check.embedded_scenes())


@pytest.mark.slow
def test_the_check_prints_and_writes_its_table(check, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results" / "table.csv"
    monkeypatch.setattr("sys.argv", ["check", "--pictures", "12", "--steps", "8", "--out", str(out)])
    check.main()
    with out.open() as file:
        generated, real, blurred, noise = csv.DictReader(file)
    distances = [float(row["distance"]) for row in (real, blurred, noise)]
    assert distances == sorted(distances)
    assert float(generated["distance"]) < distances[2] / 2  # twelve pictures cannot tell it from the floor
    assert float(generated["background colour"]) >= 0.8 > float(noise["background colour"])
    assert float(generated["CLIP score"]) > float(noise["CLIP score"])
    assert "generated" in capsys.readouterr().out


# The data it is trained on -----------------------------------------------------------------------------------------


def test_captions_are_grammatical_and_held_out_ones_never_trained_on():
    data = pytest.importorskip("examples.train_tiny.data")
    scene = data.Scene(("dog",), "orange", "striped", "on the left of")
    assert scene.caption == "a small dog on the left of an orange striped background"
    assert data.Scene(("dog", "cat"), "blue", "plain").caption == "a small dog and a small cat on a blue background"
    assert data.Scene(("dog",), "blue", "gradient").caption == "a large dog on a blue gradient background"
    held_out = {scene.caption for scene in data.held_out_scenes(2000)}
    assert len(held_out) == 2000
    assert held_out.isdisjoint(scene.caption for scene in islice(data.scenes(1), 3000))


def test_pictures_are_a_function_of_their_seed():
    data = pytest.importorskip("examples.train_tiny.data")
    if not any(path.exists() for path in data.FONT_PATHS):
        pytest.skip("Noto Color Emoji is missing: apt-get install fonts-noto-color-emoji")
    batch = data.held_out_scenes(6)
    one, again, other = (data.picture_batch(batch, 64, seed) for seed in (0, 0, 1))
    assert one.shape == (6, 3, 64, 64) and one.min() >= -1 and one.max() <= 1
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_made_ahead_come_in_order_from_any_start(workers):
    ahead = pytest.importorskip("examples.train_tiny.ahead").ahead
    assert list(ahead(partial(pow, 2), 3, 9, workers)) == [8, 16, 32, 64, 128, 256]


@pytest.mark.slow
@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="training needs transformers 5")
def test_training_from_nothing_yields_a_pipeline_that_loads_and_merges(tmp_path, monkeypatch, capsys):
    data = pytest.importorskip("examples.train_tiny.data")
    if not any(path.exists() for path in data.FONT_PATHS):
        pytest.skip("Noto Color Emoji is missing: apt-get install fonts-noto-color-emoji")
    from examples.train_tiny.__main__ import main

    monkeypatch.setattr("sys.argv", ["train_tiny", "--preset", "smoke", "--folder", str(tmp_path)])
    main()
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "assets" / "tiny_pipeline", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(torch.float32)
    report = apply_token_merging(pipe, ratio=0.5)
    assert generate(pipe, height=64, width=64).isfinite().all() and report.removed[1] == 0.5
    assert (tmp_path / "samples.png").exists()
    clip = ClipFeatures.load(tmp_path / "assets" / "tiny_clip")
    assert clip.of_texts(["a large dog"]).shape == (
        1,
        load_statistics(tmp_path / "assets" / "tiny_reference.npz").mean.numel(),
    )
    assert len((tmp_path / "assets" / "held_out_captions.txt").read_text().splitlines()) == 20
    main()  # goes on from the checkpoints, whose time is up, and exports once more
    assert "going on from step" in capsys.readouterr().out
