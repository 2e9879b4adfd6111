"""Smashing vision towers: the same numbers as by this package's own functions, before and after saving."""

import pruna_tools
import pytest
import torch
from PIL import Image
from pruna import SmashConfig, smash
from pruna_tools import make_vit, outputs, saved_and_loaded, smashed
from transformers import CLIPModel, ViTImageProcessor, pipeline

from tomesd_plus import apply_token_merging, merging_report
from tomesd_plus.tiny import TINY_CLIP

OWN = {  # hyperparameters, and what they are in this package's words
    "default": ({}, {"r": 16}),
    "r": ({"r": 4}, {"r": 4}),
    "falling": ({"r": 8, "inflection": -1.0}, {"r": (8, -1.0)}),
    "ratio": ({"reduction_ratio": 0.5}, {"ratio": 0.5}),
    "adaptive": ({"adaptive": True, "similarity": 0.5}, {"similarity": 0.5}),
    "evit": ({"method": "evit", "reduction_ratio": 0.5}, {"method": "evit", "ratio": 0.5}),
    "ats": ({"method": "ats", "r": 4}, {"method": "ats", "r": 4}),
    "ats, adaptive": ({"method": "ats", "adaptive": True}, {"method": "ats"}),
}


@pytest.mark.parametrize("name", OWN)
def test_tome_vision_is_token_merging(name, tmp_path):
    hyperparameters, options = OWN[name]
    expected = make_vit()
    apply_token_merging(expected, **options)
    model = smashed(make_vit(), {"tome_vision": hyperparameters})
    logits = outputs(model)
    assert torch.equal(logits, outputs(expected)) and torch.equal(logits, outputs(model))
    assert not torch.equal(logits, outputs(make_vit()))
    loaded = saved_and_loaded(make_vit(), {"tome_vision": hyperparameters}, tmp_path)
    assert torch.equal(logits, outputs(loaded))
    assert str(merging_report(loaded)) == str(merging_report(expected))


def test_a_pipeline(tmp_path):
    """A transformers pipeline is smashed, saved and loaded as one."""
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    model = smash(
        pipeline("image-classification", model=make_vit(), image_processor=processor),
        SmashConfig({"tome_vision": {"r": 8}}, device="cpu"),
    )
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    scores = [each["score"] for each in model(picture)]
    model.save_pretrained(tmp_path)
    loaded = pruna_tools.PrunaModel.from_pretrained(tmp_path)
    assert [each["score"] for each in loaded(picture)] == pytest.approx(scores, abs=1e-6)
    untouched = pipeline("image-classification", model=make_vit(), image_processor=processor)
    assert [each["score"] for each in untouched(picture)] != pytest.approx(scores, abs=1e-3)


def test_a_tower_inside_a_model():
    model = smashed(CLIPModel.from_pretrained(TINY_CLIP), {"tome_vision": {"r": 4}})
    with torch.no_grad():
        model.get_image_features(pixel_values=torch.rand(1, 3, 64, 64))
    report = str(merging_report(model))
    assert "65     61" in report and "61     57" in report
