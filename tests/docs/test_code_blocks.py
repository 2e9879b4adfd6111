"""The pages' code runs: a hub's models are replaced by small ones, and commands are held against their options."""

import functools
import re
import shlex
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import typer
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from PIL import Image
from transformers import pipeline as real_pipeline

import tomesd_plus
from tomesd_plus import load_tiny_pipeline, tune
from tomesd_plus.cli import app
from tomesd_plus.vision.versions import is_too_old

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<slow><!-- slow -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
NEEDS = ("pruna",)  # what may be missing
STEPS = 9  # at most, where nothing is tuned; presets refuse fewer


def blocks_of(page, language):
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [(each["code"], each["slow"] is not None) for each in found if each["language"] == language]


PYTHON_PAGES = [page for page in PAGES if blocks_of(page, "python")]
SLOW_PAGES = [page for page in PYTHON_PAGES if any(slow for _, slow in blocks_of(page, "python"))]


def quick_pipeline(*_args, most_steps=STEPS, **_options):
    pipe = load_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call(self, *args, **options):
        steps = min(options.pop("num_inference_steps", STEPS), most_steps)
        return kind.__call__(self, *args, num_inference_steps=steps, **options)

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return pipe


def quick_tune(*args, **options):
    with warnings.catch_warnings():  # with so little work it may find less than fewer steps
        warnings.filterwarnings("ignore", message=".* steps are closer than what tune has found")
        return tune(*args, **options, max_generations=6, progress=False)


def tiny_classifier(task, model, **_options):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    assert task == "image-classification" and isinstance(model, str)
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
                       image_size=64, patch_size=4)  # fmt: skip
    processor = ViTImageProcessor(size={"height": 64, "width": 64})
    return real_pipeline(task, model=ViTForImageClassification(config).eval(), image_processor=processor)


def is_there(name):
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # a folder of that name is no package


def run(page, tmp_path, monkeypatch, with_slow):
    blocks = [code for code, slow in blocks_of(page, "python") if with_slow or not slow]
    for name in NEEDS:
        if re.search(rf"^(from|import) {name}\b", "\n".join(blocks), re.MULTILINE) and not is_there(name):
            pytest.skip(f"{name} is not installed")
    if is_too_old() and "image-classification" in "\n".join(blocks):
        pytest.skip("merging in vision towers needs a newer transformers")
    picture = Image.new("RGB", (64, 64), "orange")
    picture.save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tomesd_plus.presets.tested.MISSES", frozenset())  # of numbers of steps that a test has not
    for kind in (DiffusionPipeline, AutoPipelineForText2Image):
        monkeypatch.setattr(kind, "from_pretrained", quick_pipeline)
    monkeypatch.setattr(tomesd_plus, "load_tiny_pipeline", quick_pipeline)
    monkeypatch.setattr(tomesd_plus, "tune", quick_tune)
    monkeypatch.setattr("transformers.pipeline", tiny_classifier)
    names = {"__name__": "page", "pipe": quick_pipeline(most_steps=1000 if with_slow else STEPS), "picture": picture}
    for number, code in enumerate(blocks):
        exec(compile(code, f"{page.name}, block {number + 1}", "exec"), names)
    return names


@pytest.fixture
def real_from_pretrained(monkeypatch):
    """``load_tiny_pipeline`` itself calls what is replaced."""
    from diffusers import StableDiffusionPipeline

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", StableDiffusionPipeline.from_pretrained)


@pytest.mark.filterwarnings("ignore:the presets by name were not tried")
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, real_from_pretrained):
    names = run(page, tmp_path, monkeypatch, with_slow=False)
    assert len(names) > 4  # something was defined
    assert "image" not in names or names["image"].size == (64, 64)  # the embedded pipeline's, whatever the hub id


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW_PAGES, ids=lambda page: page.name)
def test_the_slow_code_of_a_page_runs(page, tmp_path, monkeypatch, real_from_pretrained):
    run(page, tmp_path, monkeypatch, with_slow=True)


def command_lines():
    for page in PAGES:
        for code, _ in blocks_of(page, "") + blocks_of(page, "bash"):
            for line in code.replace("\\\n", " ").splitlines():
                if line.strip():
                    yield page.name, shlex.split(line, comments=True)


def test_commands_have_the_options_that_pages_give_them():
    commands = typer.main.get_command(app).commands
    seen = 0
    for page, words in command_lines():
        if "tomesd-plus" not in words[:1] and "tomesd_plus" not in words:
            continue
        start = next(index for index, word in enumerate(words) if word in ("tomesd-plus", "tomesd_plus"))
        command = commands[words[start + 1]]
        known = {option for each in command.params for option in [*each.opts, *each.secondary_opts]}
        given = {word for word in words[start + 2 :] if re.match(r"--?[a-z]", word)}
        assert given <= known, f"{page}: {given - known} of {words[start + 1]}"
        seen += 1
    assert seen > 10


def test_targets_and_scripts_of_pages_are_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = 0
    for page, words in command_lines():
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), page
            seen += 1
        for word in words:
            if word.startswith("examples/"):
                assert (ROOT / word).exists(), f"{page}: {word}"
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"`make ([\w-]+)`", text)) <= set(targets) and seen > 2
