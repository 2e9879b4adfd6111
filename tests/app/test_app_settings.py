"""What the app's backend refuses, the code that it gives, and its drawings."""

import numpy as np
import pytest
import torch
from app_tools import picture
from conftest import make_pipeline
from PIL import Image

from gradio_app import drawings, words
from gradio_app.backend import Backend
from gradio_app.settings import Candidate, Refused
from tomesd_plus import CosineSchedule, load_tiny_pipeline
from tomesd_plus.evaluation.images import to_image
from tomesd_plus.evaluation.reporting import difference, merge_map_overlay


@pytest.fixture
def backend(pipe):
    return Backend(pipe, "a/model")


# Bounds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "a" * 501}, "the prompt has 501 characters: at most 500"),
        ({"negative_prompt": "a" * 501}, "the negative prompt has 501 characters"),
        ({"seed": -1}, "the seed must be a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "the seed"),
        ({"steps": 0}, "the number of steps must be a whole number from 1 to 100, not 0"),
        ({"steps": 101}, "the number of steps"),
        ({"steps": 2.5}, "the number of steps"),
        ({"guidance_scale": float("nan")}, "the guidance must be a number from 0 to 30"),
        ({"width": 128}, "the width must be a whole number from 16 to 64, not 128"),
        ({"height": 33}, "the height must be a multiple of 8 pixels, not 33"),
    ],
)
def test_a_picture_out_of_bounds_is_refused_in_words(backend, changes, told):
    with pytest.raises(ValueError) as raised:
        backend.compare(picture(**changes), Candidate())
    assert isinstance(raised.value, Refused) and str(raised.value).startswith(told)
    shown = words.in_words(raised.value)
    assert shown[0].isupper() and shown.endswith(".") and not shown.endswith("..")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ratio": 0.8}, "the ratio must be a number from 0 to 0.75, not 0.8"),
        ({"ratio": None}, "the ratio"),
        ({"schedule": "sine"}, "unknown schedule 'sine'"),
        ({"more_at": "never"}, "more_at must be 'noisy' or 'clean'"),
        ({"merged": "everything"}, "cannot merge 'everything': choose from self-attention"),
        ({"max_downsample": 3}, "max_downsample must be one of"),
        ({"cache_interval": 11}, "the cache interval must be a whole number from 1 to 10"),
        ({"preset": "best"}, "unknown preset 'best'"),
    ],
)
def test_a_candidate_out_of_bounds_is_refused_in_words(backend, changes, told):
    with pytest.raises(ValueError) as raised:
        backend.compare(picture(), Candidate(**changes))
    assert isinstance(raised.value, Refused) and str(raised.value).startswith(told)
    assert not backend.remembers(picture())


def test_a_grid_has_a_bounded_number_of_pictures(backend):
    for count in (0, 10):
        with pytest.raises(ValueError, match="choose 1 to 9 settings"):
            backend.explore(picture(), [Candidate()] * count)


def test_an_overflow_and_a_withheld_picture_are_told_in_words(backend, monkeypatch):
    weight = backend.pipe.vae.decoder.conv_out.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the model overflows in float32"):
        backend.compare(picture(), Candidate())
    with torch.no_grad():
        weight.copy_(kept)
    monkeypatch.setattr(type(backend.pipe), "run_safety_checker", lambda self, image, *rest: (image, [True]))
    with pytest.raises(ValueError, match="safety checker withheld"):
        backend.compare(picture(), Candidate())


@pytest.mark.parametrize("error", [KeyError, ValueError])  # a ValueError of another package is not the user's fault
def test_an_unknown_error_is_logged_and_told_without_its_inside(error, caplog):
    told = words.in_words(error("/a/secret/path"))
    assert error.__name__ in told and "secret" not in told and "secret" in caplog.text


# Code ---------------------------------------------------------------------------------------------------------------


def run_code(code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(compile(code, "snippet", "exec"), {})
    return np.asarray(Image.open("picture.png"))


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate(),
        Candidate(ratio=0.35, schedule="linear", more_at="clean", merged="attentions, MLP", cache_interval=2),
        Candidate(ratio=0.6, schedule="steps", merged="whole blocks", max_downsample=2),
        Candidate(ratio=0, cache_interval=3),
        Candidate(ratio=0),
        Candidate(preset="fast"),
    ],
    ids=lambda candidate: candidate.name,
)
def test_the_code_gives_the_same_picture(candidate, tmp_path, monkeypatch):
    backend = Backend(load_tiny_pipeline())
    asked = picture(prompt='a "large" dog\n\\ on a blue background', negative_prompt="red", width=64, height=48,
                    guidance_scale=7.123456789)  # fmt: skip
    result = backend.compare(asked, candidate)
    assert (run_code(result.code, tmp_path, monkeypatch) == np.asarray(to_image(result.merged.pixels))).all()


def test_the_code_loads_a_model_of_ones_own(tmp_path, monkeypatch):
    make_pipeline("sd").save_pretrained(tmp_path / "model")
    backend = Backend(make_pipeline("sd"), str(tmp_path / "model"))
    result = backend.compare(picture(), Candidate())
    assert (run_code(result.code, tmp_path, monkeypatch) == np.asarray(to_image(result.merged.pixels))).all()


# Drawings -----------------------------------------------------------------------------------------------------------


def test_the_curve_falls_where_the_schedule_does():
    def heights(svg):
        points = svg.split('class="curve" points="')[1].split('"')[0].split()
        return [float(point.split(",")[1]) for point in points]

    down, up = (heights(drawings.curve(each)) for each in (CosineSchedule(), CosineSchedule().reversed()))
    assert down == sorted(down) and up == sorted(up, reverse=True)  # y grows downwards


def test_the_difference_is_black_where_pictures_are_equal_and_four_times_as_strong_elsewhere():
    pixels, other = torch.full((3, 2, 2), 0.5), torch.full((3, 2, 2), 0.5)
    other[0, 0, 0], other[1, 0, 1] = 0.4, 1.0
    shown = difference(other, pixels)
    assert shown[0, 0, 0] == pytest.approx(0.4) and shown[1, 0, 1] == 1 and shown.sum() == pytest.approx(1.4)


def test_the_merge_map_colours_merged_tokens_only():
    pixels = torch.full((3, 8, 8), 0.5)
    merge_map = torch.ones(4, 4, dtype=torch.int64)
    merge_map[0, 0], merge_map[0, 1] = 2, 16
    overlay = merge_map_overlay(pixels, merge_map)
    assert torch.equal(overlay[:, 2:], merge_map_overlay(pixels, None)[:, 2:])
    pair, many = overlay[:, 0, 0], overlay[:, 0, 2]
    assert pair[0] > pair[2] and pair[1] > many[1]  # yellow, and red
