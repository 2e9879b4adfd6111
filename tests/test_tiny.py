"""The embedded pipeline: real, offline, small, and merging works on it."""

import stat
from itertools import islice

import pytest
import torch
import transformers
from conftest import generate
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from tomesd_plus import apply_token_merging, load_tiny_pipeline
from tomesd_plus.tiny import TINY_PIPELINE


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
    files = [path for path in TINY_PIPELINE.rglob("*") if path.is_file()]
    assert 1e6 < sum(path.stat().st_size for path in files) < 25e6
    assert all(path.stat().st_mode & stat.S_IROTH for path in files)


def test_dtype_can_be_chosen():
    assert load_tiny_pipeline(dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_words_of_its_captions_are_single_tokens(tiny):
    words = ["a", "large", "red", "apple", "on", "a", "blue", "striped", "background"]
    assert len(tiny.tokenizer.tokenize(" ".join(words))) == len(words)
    assert tiny.tokenizer.unk_token_id not in tiny.tokenizer("zebra ünï 3").input_ids[1:-1]


@pytest.mark.slow
def test_backgrounds_have_the_colour_that_was_asked_for(tiny):
    data = pytest.importorskip("examples.train_tiny.data")
    wanted = ["red", "green", "blue", "yellow", "purple", "white"]
    prompts = [f"a large star on a {color} background" for color in wanted]
    pictures = generate(tiny, prompt=prompts, height=64, width=64, num_inference_steps=12, guidance_scale=4.0)
    palette = torch.tensor(list(data.COLORS.values())) / 255
    for color, picture in zip(wanted, pictures):
        corners = torch.stack([picture[:, y, x] for y in (2, -3) for x in (2, -3)]).median(dim=0).values
        assert list(data.COLORS)[(palette - corners).norm(dim=1).argmin()] == color


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="training needs transformers 5")
def test_training_from_nothing_yields_a_pipeline_that_loads_and_merges(tmp_path, monkeypatch):
    data = pytest.importorskip("examples.train_tiny.data")
    if not any(path.exists() for path in data.FONT_PATHS):
        pytest.skip("Noto Color Emoji is missing: apt-get install fonts-noto-color-emoji")
    from examples.train_tiny.__main__ import main

    monkeypatch.setattr("sys.argv", ["train_tiny", "--preset", "smoke", "--folder", str(tmp_path)])
    main()
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(torch.float32)
    report = apply_token_merging(pipe, ratio=0.5)
    assert generate(pipe, height=64, width=64).isfinite().all() and report.removed[1] == 0.5
    assert (tmp_path / "samples.png").exists()
