"""Towers inside models, backbones and transformers' pipelines."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessor, pipeline

from tests.vision_tools import KINDS, LAYERS, PATCHES, forward, make_config, make_tower, papers_forward, pictures
from tomesd_plus import apply_token_merging, merging_report, remove_token_merging
from tomesd_plus.tiny import TINY_CLIP

SIZES = {"height": 32, "width": 32}
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def classifier():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(make_config("vit", num_labels=4, initializer_range=0.5)).eval()


def test_image_classification_goes_on_taking_what_it_took(picture):
    pipe = pipeline("image-classification", model=classifier(), image_processor=ViTImageProcessor(size=SIZES))
    untouched = pipe(str(picture))
    report = apply_token_merging(pipe, r=8)
    from_file, from_picture = pipe(str(picture)), pipe(Image.open(picture))
    assert from_file == from_picture and from_file != untouched and report.towers == ["vit"]
    assert len(pipe([str(picture)] * 3, batch_size=2)) == 3 and report.removed == 0.5
    assert merging_report(pipe).removed == 0.5
    remove_token_merging(pipe)
    assert pipe(str(picture)) == untouched


def test_image_feature_extraction_keeps_its_shape(picture):
    pipe = pipeline(
        "image-feature-extraction", model=make_tower("dinov2"), image_processor=ViTImageProcessor(size=SIZES)
    )
    untouched = np.array(pipe(str(picture)))
    report = apply_token_merging(pipe, r=8)
    features = np.array(pipe(Image.open(picture)))
    assert features.shape == untouched.shape == (1, PATCHES + 1, 32) and report.merged
    assert np.abs(features - untouched).max() > 1e-2


def test_zero_shot_classification_merges_in_the_vision_tower_alone(picture):
    pipe = pipeline("zero-shot-image-classification", model=str(TINY_CLIP), dtype=torch.float32)
    labels = {"candidate_labels": ["star", "circle"]}
    untouched = pipe(str(picture), **labels)
    report = apply_token_merging(pipe, r=8)
    assert pipe(str(picture), **labels) != untouched
    assert report.towers == ["vision_model"] and [layer.after for layer in report.layers] == [57, 49, 41]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.model.text_model.modules())


def test_siglip_inside_its_model():
    text = transformers.SiglipTextConfig(**SMALL, vocab_size=9, projection_size=32, bos_token_id=1, eos_token_id=2)
    config = transformers.SiglipConfig(text_config=text.to_dict(), vision_config=make_config("siglip").to_dict())
    model = transformers.SiglipModel(config).eval()
    report = apply_token_merging(model, r=8)
    with torch.no_grad():
        output = model(input_ids=torch.ones(2, 5, dtype=torch.long), pixel_values=pictures())
    assert output.logits_per_image.shape == (2, 2) and report.towers == ["vision_model"] and report.removed == 0.5


def test_llava_reads_the_last_layer_but_one_at_full_length():
    text = transformers.LlamaConfig(**SMALL, vocab_size=100)
    config = transformers.LlavaConfig(
        vision_config=make_config("clip"), text_config=text, image_token_id=99, vision_feature_layer=-2,
        image_seq_length=PATCHES,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[99] * PATCHES + [1, 2, 3]])
    with torch.no_grad():
        untouched = model(input_ids=ids, pixel_values=pictures(1)).logits
        report = apply_token_merging(model, r=8)
        merged = model(input_ids=ids, pixel_values=pictures(1)).logits
        again = model(input_ids=ids, pixel_values=pictures(1)).logits
    assert merged.shape == untouched.shape and (merged - untouched).abs().max() > 1e-3 and torch.equal(merged, again)
    assert report.towers == ["model.vision_tower"] and report.removed == 0.5


@pytest.mark.parametrize("kind", ["dinov2", "dinov2 registers", "dinov3"])
def test_backbones_hand_out_grids(kind):
    name = {"dinov2": "Dinov2", "dinov2 registers": "Dinov2WithRegisters", "dinov3": "DINOv3ViT"}[kind] + "Backbone"
    torch.manual_seed(0)
    model = getattr(transformers, name)(make_config(kind, out_features=["stem", "stage1", "stage4"])).eval()
    with torch.no_grad():
        untouched = model(pictures()).feature_maps
        report = apply_token_merging(model, r=16)
        merged = model(pictures()).feature_maps
    assert report.merged and [each.shape for each in merged] == [each.shape for each in untouched]
    assert torch.equal(merged[0], untouched[0])
    groups = report.source_map(0)[0].flatten()
    first, last = (
        groups.tolist().index(groups.mode().values),
        len(groups) - 1 - groups.tolist()[::-1].index(groups.mode().values),
    )
    grid = merged[1][0].flatten(1)
    assert first != last and torch.equal(grid[:, first], grid[:, last])  # in place, with their token's value


def test_depth_estimation_on_a_backbone():
    backbone = make_config(
        "dinov2", out_features=[f"stage{i}" for i in range(1, 5)], reshape_hidden_states=False, apply_layernorm=True
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
        patch_size=4, head_in_channels=8, head_hidden_size=8,
    )  # fmt: skip
    model = transformers.DepthAnythingForDepthEstimation(config).eval()
    report = apply_token_merging(model, r=8)
    with torch.no_grad():
        assert model(pictures()).predicted_depth.shape == (2, 32, 32)
    assert report.removed == 0.5


@pytest.mark.parametrize("kind", ["vit", "deit", "clip", "siglip", "dinov2", "dinov3"])
def test_other_sizes(kind):
    model, prefix = make_tower(kind), KINDS[kind][0]
    report = apply_token_merging(model, ratio=0.5)
    options = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
    for batch, height, width in ((1, 40, 24), (3, 32, 32), (2, 24, 48)):
        output = forward(model, pictures(batch, height, width), **options)
        rows, columns = height // 4, width // 4
        patches = rows * columns
        assert output.shape[:2] == (batch, prefix + patches)
        assert report.source_map().shape == (batch, rows, columns)
        left = [prefix + patches - patches // 2 * layer // LAYERS for layer in range(LAYERS + 1)]
        assert [(layer.before, layer.after) for layer in report.layers] == list(pairwise(left))


@pytest.mark.parametrize("kind, options", [("vit", {"interpolate_pos_encoding": True}), ("dinov3", {})])
def test_pictures_that_are_not_square_get_the_papers_block(kind, options):
    model, batch, removed = make_tower(kind), pictures(2, 24, 48), [9, 5, 7, 3]
    expected = papers_forward(model, batch, removed, KINDS[kind][0], **options)
    apply_token_merging(model, r=removed)
    with torch.no_grad():
        hidden = model(batch, output_hidden_states=True, **options).hidden_states
    for ours, theirs in zip(hidden[1:], expected, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5


def test_the_embedded_clip_reads_pictures_nearly_as_before():
    model = transformers.CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(TINY_CLIP)
    image = Image.new("RGB", (64, 64), (40, 80, 200))
    image.paste((250, 220, 60), (16, 16, 48, 48))
    inputs = processor(images=image, return_tensors="pt")
    with torch.no_grad():
        untouched = model.get_image_features(**inputs).pooler_output
        apply_token_merging(model, ratio=0.4)
        merged = model.get_image_features(**inputs).pooler_output
    assert not torch.equal(merged, untouched)
    assert torch.cosine_similarity(merged, untouched).item() > 0.97
