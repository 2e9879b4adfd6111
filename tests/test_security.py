"""What a stranger hands over (models, files, names) runs nothing, leads nowhere else, and breaks no run."""

import json
import os
import pickle
import shutil
import socket
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import INPUTS, make_pipeline, make_unet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tomesd_plus import apply_token_merging
from tomesd_plus.evaluation.configurations import complete, load_configurations, parse_configuration
from tomesd_plus.evaluation.errors import EvaluationError, ModelError
from tomesd_plus.evaluation.experiment import INDEX, MANIFEST, Experiment
from tomesd_plus.evaluation.file_io import read_json
from tomesd_plus.evaluation.generation import Sampling, generate_experiment, load_model
from tomesd_plus.evaluation.items import Item, make_items
from tomesd_plus.evaluation.plain_data import checked, load_json, load_yaml
from tomesd_plus.evaluation.scoring import Scoring, load_extractor, load_results, score
from tomesd_plus.evaluation.scoring.reference import load_reference
from tomesd_plus.evaluation.speed import SPEED_FILE, load_speeds
from tomesd_plus.merging.gate import Gate
from tomesd_plus.tiny import TINY_CLIP, TINY_PIPELINE


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


# Models --------------------------------------------------------------------------------------------------------------


def test_weights_are_read_from_safetensors_only(tmp_path):
    mark, folder = tmp_path / "mark", tmp_path / "model"
    shutil.copytree(TINY_PIPELINE, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(str(folder))
    for suffix in ("ckpt", "CKPT", "pt", "pth", "bin"):
        file = tmp_path / f"model.{suffix}"
        file.write_bytes(pickle.dumps(Evil(mark)))
        with pytest.raises(ModelError, match=r"convert it to \.safetensors"):
            load_model(str(file))
    clip = tmp_path / "clip"
    shutil.copytree(TINY_CLIP, clip)
    (clip / "model.safetensors").unlink()
    (clip / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(EvaluationError, match="cannot load the CLIP model"):
        load_extractor(str(clip))
    assert not mark.exists()


def test_no_code_that_comes_with_a_model_is_run(tmp_path):
    mark = tmp_path / "mark"
    code = (
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from diffusers import UNet2DConditionModel as Own, StableDiffusionPipeline as OwnPipeline\n"
    )
    for place, key, value in (("unet/evil.py", "unet", ["evil", "Own"]),
                              ("evil.py", "_class_name", ["evil", "OwnPipeline"])):  # fmt: skip
        folder = tmp_path / key
        shutil.copytree(TINY_PIPELINE, folder)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, key: value}))
        (folder / place).write_text(code)
        with pytest.raises(ModelError, match="cannot load model"):
            load_model(str(folder))
    assert not mark.exists()


# Files ---------------------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000
HOSTILE_JSON = [
    b"", b"\xff\xfe", b"{", b"null", b"3", b'"text"', b"[]", b"[1]", b"{}", b'{"a": 1}', b'{"a": NaN}', b'{"a": []}',
    DEEP.encode(), b'{"a": ' + DEEP.encode(), pickle.dumps({"a": 1}), b'{"rows": 3}', b'{"rows": [3]}',
    b'{"items": 3, "configurations": []}', b'{"items": [{}], "configurations": []}',
    b'{"items": [], "configurations": ["../x"], "prompts": "p"}',
    b'{"items": [], "configurations": [3], "prompts": "p"}',
    b'{"items": [], "configurations": [], "prompts": "p", "more": 1}',
]  # fmt: skip

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def gate_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "tomesd_plus").mkdir()
    return tmp_path / "tomesd_plus" / "gate.json"


def measured_key(gate_file):
    """The key of what is measured here."""
    unet = make_unet()
    apply_token_merging(unet, ratio=0.5, gate="on")
    with torch.no_grad():
        unet(INPUTS["sample"], 700, INPUTS["encoder_hidden_states"])
    (key,) = json.loads(gate_file.read_text())
    return key


TIMES = [
    {"untouched_ms": "1", "merged_ms": "2"}, {"untouched_ms": None, "merged_ms": 1}, {"untouched_ms": 1}, [], 3, None,
    {"untouched_ms": -1.0, "merged_ms": 1.0}, {"untouched_ms": True, "merged_ms": 1.0},
    {"untouched_ms": [], "merged_ms": {}},
    {"untouched_ms": 1.0, "merged_ms": 1.0, "more": 1}, {"untouched_ms": 1e999, "merged_ms": 1.0}, "text",
]  # fmt: skip


def test_a_strangers_gate_file_breaks_no_run(gate_file):
    key = measured_key(gate_file)
    good = json.loads(gate_file.read_text())[key]
    for times in TIMES:
        gate_file.write_text(json.dumps({key: times, "another": good}))
        assert set(Gate(gate_file).decisions) == {"another"} or not Gate(gate_file).decisions
    for content in HOSTILE_JSON:
        gate_file.write_bytes(content)
        assert not Gate(gate_file).decisions
        unet = make_unet()
        apply_token_merging(unet, ratio=0.5, gate="on")
        with torch.no_grad():
            assert unet(INPUTS["sample"], 700, INPUTS["encoder_hidden_states"]).sample.isfinite().all()
        assert json.loads(gate_file.read_text()).keys() == {key}


def test_a_gate_file_may_be_huge_a_pipe_or_a_folder(gate_file):
    with gate_file.open("wb") as file:
        file.truncate(2**34)  # sparse: takes no space
    assert not Gate(gate_file).decisions
    gate_file.unlink()
    os.mkfifo(gate_file)
    assert not Gate(gate_file).decisions
    gate_file.unlink()
    gate_file.mkdir()
    assert not Gate(gate_file).decisions
    measure = Gate(gate_file)
    measure.decide("key", torch.device("cpu"), lambda: None, lambda: None)  # cannot be kept, and says nothing
    assert len(measure.decisions) == 1 and not list(gate_file.parent.glob("tmp*"))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(json_values)
def test_any_json_is_a_gate_file_or_none(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("gate") / "gate.json"
    path.write_text(json.dumps(value))
    for decision in Gate(path).decisions.values():
        assert decision.pays in (True, False) and str(decision)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    items = tuple(make_items([(f"{index:06}", f"a {index}") for index in range(2)]))
    generate_experiment(
        make_pipeline("sd"), "random weights", Experiment(out, items, "a test"),
        complete([parse_configuration("merge: 0.5")], noise_floor=False), Sampling(steps=2, height=32, width=32),
        timed_runs=1, equal_time=False,
    )  # fmt: skip
    score(out, Scoring(resamples=5))
    return out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "evaluation")


@pytest.mark.parametrize("name", [INDEX, "results.json", SPEED_FILE, f"baseline/{MANIFEST}"])
def test_a_strangers_files_are_refused_in_words(out, name):
    """Each of an evaluation's files may be anything: one line says so, without a traceback."""
    for content in HOSTILE_JSON:
        (out / name).write_bytes(content)
        for call in (
            lambda: load_results(out),
            lambda: load_speeds(Experiment.load(out)),
            lambda: score(out, Scoring(resamples=5)),
        ):
            try:
                call()
            except EvaluationError as error:
                assert len(str(error)) > 20


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_value_of_any_type_in_any_place(finished, tmp_path_factory, data):
    """One value of an evaluation's file replaced by any other: it is refused in words, or harmless."""
    out = shutil.copytree(finished, tmp_path_factory.mktemp("one") / "evaluation")
    name = data.draw(st.sampled_from([INDEX, "results.json", SPEED_FILE, f"baseline/{MANIFEST}"]))
    content = json.loads((out / name).read_text())
    places = list(_places(content))
    *above, key = data.draw(st.sampled_from(places))
    inner = content
    for step in above:
        inner = inner[step]
    inner[key] = data.draw(json_values | st.just("../../outside") | st.just("/etc"))
    (out / name).write_text(json.dumps(content))
    before = {path for path in out.parent.rglob("*") if out not in (path, *path.parents)}
    for call in (lambda: load_results(out), lambda: score(out, Scoring(resamples=5))):
        try:
            call()
        except EvaluationError as error:
            assert len(str(error)) > 20
    assert {path for path in out.parent.rglob("*") if out not in (path, *path.parents)} == before


def _places(value, above=()):
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*above, key)
        yield from _places(entry, (*above, key))


def test_scores_of_a_stranger_are_computed_again(out):
    before = load_results(out)
    (part,) = (out / "merge-0.5").glob("score-*.json")
    content = json.loads(part.read_text())
    for change in ({"metrics": {"PSNR dB": {"value": "x", "low": 1, "high": 2, "count": 3}}}, {"unreadable": 3},
                   {"notes": "text"}, {"images": 5}, {"metrics": []}):  # fmt: skip
        part.write_text(json.dumps(content | change))
        score(out, Scoring(resamples=5))
        assert [row.metrics for row in load_results(out)] == [row.metrics for row in before]
    for junk in HOSTILE_JSON:
        part.write_bytes(junk)
        score(out, Scoring(resamples=5))
    assert [row.metrics for row in load_results(out)] == [row.metrics for row in before]


def test_no_name_leads_out_of_the_evaluation(out, tmp_path):
    for name in ("../../outside", "/tmp/outside", "..", ".hidden", "a/b", "", "a\\..\\b", "a\0b"):
        with pytest.raises(ValueError, match="id must be"):
            Item(name, "a cat", 0)
        index = json.loads((out / INDEX).read_text())
        (out / INDEX).write_text(json.dumps(index | {"configurations": ["baseline", name]}))
        with pytest.raises(EvaluationError, match="is not an evaluation's"):
            Experiment.load(out)
        (out / INDEX).write_text(json.dumps(index))
    for name in ("../../outside", "/etc/passwd", "..\\..\\x", "a/b/c", "~/x", "C:\\x", "CON", "x\0y", "..", "x" * 5000,
                 "é" * 200, "results.json", "experiment.json", "two\nlines", "a|b"):  # fmt: skip
        if name == "..":
            with pytest.raises(EvaluationError, match="needs a letter or a digit"):
                parse_configuration({"name": name, "merge": 0.5})
            continue
        folder = parse_configuration({"name": name, "merge": 0.5}).folder
        (tmp_path / folder).mkdir(exist_ok=True)
        assert (tmp_path / folder).parent == tmp_path and len(folder.encode()) <= 160
        assert folder not in ("results.json", "experiment.json") and not folder.startswith(".")


def test_yaml_runs_nothing_and_stays_small(tmp_path):
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
    )
    merges = "a: &a {1: 1, 2: 2, 3: 3}\n" + "".join(
        f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi")
    )
    mark = tmp_path / "mark"
    hostile = [
        laughs, merges, "- &a [*a]", "- &a {merge: *a}",
        f"- !!python/object/apply:pathlib.Path.touch [!!python/object:pathlib.Path {{a: {mark}}}]",
        f"!!python/object/apply:os.system ['touch {mark}']", DEEP, "- {merge: " + DEEP, "\0", "- merge: .nan", "- 3",
        "- [1, 2]", "- {merge: {ratio: .inf}}", "- {merge: {ratio: 2020-01-01}}", "- {1: 2}", "- {? [1, 2] : 3}", "{}",
        "- {name: {a: b}, steps: x, merge: 0.5}", "- {merge: 0.5, steps: true}", "? {a: b}\n: c", "- {merge: *a}",
    ]  # fmt: skip
    for text in hostile:
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(EvaluationError) as raised:
            load_configurations(tmp_path / "c.yaml")
        assert len(str(raised.value)) < 2000
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError):
        load_configurations(tmp_path / "c.yaml")
    with (tmp_path / "c.yaml").open("wb") as file:
        file.truncate(2**34)
    with pytest.raises(EvaluationError, match="MiB, more than any"):
        load_configurations(tmp_path / "c.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(EvaluationError, match="not a file"):
        load_configurations(tmp_path / "pipe.yaml")
    assert not mark.exists()


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_a_configuration_or_refused(text):
    for make in (lambda: parse_configuration(text), lambda: parse_configuration({"name": text, "merge": 0.5})):
        try:
            folder = make().folder
        except EvaluationError:
            continue
        assert folder and not set(folder) & set("/\\\0") and not folder.startswith(".")


def test_json_has_no_nan_and_is_not_too_deep(tmp_path):
    for text in ('{"a": NaN}', "[Infinity]", DEEP):
        with pytest.raises(ValueError, match=r"holds|nested"):
            load_json(text)
    (tmp_path / "a.json").write_text(DEEP)
    with pytest.raises(EvaluationError, match="nested too deeply"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="nested too deeply"):
        load_yaml(DEEP)
    with pytest.raises(TypeError, match="seed is True"):
        checked(Item, {"prompt_id": "1", "prompt": "a", "seed": True})


def test_statistics_of_a_stranger_run_nothing(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "r.npz"
    clip = load_extractor("tiny")
    dimensions = clip.dimensions
    good = {"mu": np.zeros(dimensions), "sigma": np.eye(dimensions)}
    hostile = [
        {"mu": np.array([Evil(mark)] * dimensions, dtype=object), "sigma": np.eye(dimensions)},
        good | {"features": np.array([Evil(mark)], dtype=object)}, good | {"features": np.zeros(3)},
        good | {"features": np.full((4, dimensions), np.nan)}, 
        good | {"features": np.zeros((4, dimensions), dtype="U3")},
        good | {"count": np.zeros(3)}, good | {"count": np.array("x")}, good | {"count": np.array(-1)},
        good | {"skipped": np.array("[")}, good | {"skipped": np.array('{"a": "b"}')}, 
        good | {"extractor": np.zeros(5)},
        {"mu": np.zeros((2, 2)), "sigma": np.zeros((2, 2))}, {"mu": np.array("x"), "sigma": np.array("y")},
    ]  # fmt: skip
    for arrays in hostile:
        np.savez(path, **arrays)
        with pytest.raises(EvaluationError, match=r"cannot read statistics|holds statistics by"):
            load_reference(str(path), clip, tmp_path / "f.npy")
    for junk in (b"", b"PK\x03\x04", pickle.dumps(Evil(mark))):
        path.write_bytes(junk)
        with pytest.raises(EvaluationError, match="cannot read statistics"):
            load_reference(str(path), clip, tmp_path / "f.npy")
    assert not mark.exists()


def test_an_archive_of_zeros_does_not_fill_the_memory(tmp_path, monkeypatch):
    import psutil

    path = tmp_path / "r.npz"
    np.savez_compressed(path, mu=np.zeros(64), sigma=np.zeros((64, 64)), features=np.zeros((200_000, 64)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**20}))
    with pytest.raises(EvaluationError, match="more than there is memory"):
        load_reference(str(path), load_extractor("tiny"), tmp_path / "f.npy")


# The app -------------------------------------------------------------------------------------------------------------


def test_the_app_listens_on_loopback_and_serves_no_files(app_url):
    pytest.importorskip("gradio")
    address = urllib.parse.urlparse(app_url)
    assert address.hostname in ("127.0.0.1", "localhost")
    others = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for other in others - {"127.0.0.1"} - {f"127.0.{a}.{b}" for a in range(2) for b in range(2)}:
        with pytest.raises(OSError), socket.create_connection((other, address.port), timeout=2):
            pass
    for path in ("pyproject.toml", "/etc/passwd", "../../../etc/passwd", str(Path(__file__)), "%2fetc%2fpasswd",
                 "gradio_app/backend.py", ".git/config"):  # fmt: skip
        for prefix in ("gradio_api/file=", "file=", "static/", "assets/"):
            try:
                with urllib.request.urlopen(f"{app_url}{prefix}{path}", timeout=20) as answer:
                    body = answer.read()
            except (urllib.error.HTTPError, ValueError):
                continue
            assert b"root:" not in body and b"[project]" not in body and b"import " not in body[:200]


def test_the_app_is_launched_on_loopback_unless_told_otherwise(monkeypatch):
    gradio = pytest.importorskip("gradio")
    from gradio_app.start import start

    launched = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: launched.update(options))
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    start()
    assert launched["server_name"] in (None, "127.0.0.1") and launched["share"] is False
    start(host="0.0.0.0")
    assert launched["server_name"] == "0.0.0.0"
