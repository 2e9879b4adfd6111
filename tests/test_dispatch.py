"""The same names for diffusion pipelines and for vision towers."""

import pytest
import torch
from transformers import BertConfig, BertModel

from tests import vision_tools
from tests.conftest import make_pipeline
from tomesd_plus import ToMeConfig, apply_token_merging, merging_report, remove_token_merging, token_merging
from tomesd_plus.vision.versions import OLDEST, is_too_old

if is_too_old():
    pytest.skip(f"merging in vision towers needs transformers {OLDEST}", allow_module_level=True)


def test_each_model_goes_to_its_room():
    pipe, tower = make_pipeline("sd"), vision_tools.make_tower()
    with token_merging(pipe, 0.5) as of_diffusion, token_merging(tower, 8) as of_vision:
        assert type(of_diffusion).__name__ == type(merging_report(pipe)).__name__ == "TokenMergingReport"
        assert type(of_vision).__name__ == type(merging_report(tower)).__name__ == "TowerReport"
    for model in (pipe, tower):
        with pytest.raises(ValueError, match="not applied"):
            merging_report(model)


def test_a_module_around_a_tower_is_a_tower():
    wrapped = torch.nn.Sequential(vision_tools.make_tower())
    assert apply_token_merging(wrapped).towers == ["0"]
    remove_token_merging(wrapped)


@pytest.mark.parametrize("option", ["r", "similarity", "method", "protect"])
def test_options_of_towers_are_refused_for_pipelines(option):
    with pytest.raises(TypeError, match=rf"{option}: for transformers' vision towers only.*ratio="):
        apply_token_merging(make_pipeline("sd"), **{option: 8})


def test_options_of_pipelines_are_refused_for_towers():
    tower = vision_tools.make_tower()
    with pytest.raises(TypeError, match="max_downsample, window: not for the vision tower of ViTModel, which"):
        apply_token_merging(tower, max_downsample=2, window=4)
    with pytest.raises(TypeError, match="a ToMeConfig: not for the vision tower"):
        apply_token_merging(tower, ToMeConfig())
    with pytest.raises(TypeError, match="r is given twice"):
        apply_token_merging(tower, 8, r=8)


def test_what_has_nothing_to_merge_is_refused_in_words():
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    for use in (apply_token_merging, remove_token_merging, merging_report):
        with pytest.raises(TypeError, match=r"BertModel has no vision tower.*ViT, DeiT, CLIP, SigLIP, DINOv2 or"):
            use(bert)
    with pytest.raises(TypeError, match=r"expected a diffusers pipeline with a UNet .* not Linear"):
        apply_token_merging(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    "model, words", [(BertModel, "the class BertModel"), (None, "None"), ("google/vit", "'google/vit'")]
)
def test_what_is_no_model_is_refused_in_words(model, words):
    for use in (apply_token_merging, remove_token_merging, merging_report):
        with pytest.raises(TypeError, match=rf"expected a diffusers pipeline .* vision tower .*, not {words}: load"):
            use(model)
