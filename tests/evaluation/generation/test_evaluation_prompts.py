"""Prompts from wherever they lie."""

import json
import sys

import pytest
from PIL import Image

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.generation import load_prompts
from tomesd_plus.evaluation.images import Images
from tomesd_plus.evaluation.items import make_items
from tomesd_plus.tiny import held_out_captions

FILES = {
    "lines.txt": "a cat\na dög\n",
    "parti.tsv": "Prompt\tCategory\na cat\tAnimals\na dög\tAnimals\n",
    "draw.csv": 'Category,Prompts\nx,a cat\ny,"a dög"\n',
    "list.json": '["a cat", "a dög"]',
    "objects.json": '[{"id": 3, "caption": "a cat"}, {"caption": "a dög"}]',
    "coco.json": json.dumps(
        {"images": [], "annotations": [{"image_id": 1, "caption": t} for t in ("a cat", "a dög")]}
    ),
    "bom.txt": "\ufeffa cat\na dög\n",
    "bom.csv": "\ufeffprompt,category\na cat,x\na dög,y\n",
    "no_suffix": "a cat\na dög\n",
    "lines.jsonl": '{"text": "a cat"}\n\n{"text": "a dög"}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file(name, tmp_path):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    prompts = load_prompts(str(tmp_path / name))
    assert prompts.entries == (("000000", "a cat"), ("000001", "a dög")) and prompts.skipped == 0


def test_a_quote_in_a_list_with_tabs_is_a_quote(tmp_path):
    (tmp_path / "p.tsv").write_text('Prompt\tn\n"a cat\t1\na 5" dog\t2\n')
    assert [text for _, text in load_prompts(str(tmp_path / "p.tsv")).entries] == ['"a cat', 'a 5" dog']


def test_the_embedded_ones():
    prompts = load_prompts(limit=5)
    assert [text for _, text in prompts.entries] == held_out_captions()[:5]


def test_empty_prompts_are_counted_and_the_others_keep_their_places(tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\n   \na dog\n")
    prompts = load_prompts(str(tmp_path / "p.txt"))
    assert prompts.entries == (("000000", "a cat"), ("000003", "a dog")) and prompts.skipped == 2


def test_a_column_by_name(tmp_path):
    (tmp_path / "p.tsv").write_text("caption\tother\na\tb\n")
    assert load_prompts(str(tmp_path / "p.tsv"), column="other").entries[0][1] == "b"
    with pytest.raises(EvaluationError, match="'caption', 'other'"):
        load_prompts(str(tmp_path / "p.tsv"), column="none")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"\n \n", "no prompt that is not empty"),
        ("p.txt", b"\xff\xfe\x00", "cannot read prompts"),
        ("p.json", b"[1, 2", "cannot read prompts"),
        ("p.json", b'{"a": 1}', "expected a list"),
        ("p.tsv", b"x\ty\n1\t2\n", "choose a column"),
        ("p.csv", b"", "choose a column"),
    ],
)
def test_what_cannot_be_read_is_said(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError, match=words):
        load_prompts(str(tmp_path / name))


@pytest.mark.parametrize("name", ["lines.txt", "list.json", "embedded"])
def test_a_column_where_there_are_none_is_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(FILES.get(name, ""), encoding="utf-8")
    with pytest.raises(EvaluationError, match="column"):
        load_prompts(name, column="caption")


def test_missing_files_and_libraries_are_said(tmp_path, monkeypatch):
    with pytest.raises(EvaluationError, match="No such file"):
        load_prompts(str(tmp_path / "none.txt"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EvaluationError, match="pip install datasets"):
        load_prompts("nobody/no-prompts")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(EvaluationError, match="pip install pyarrow"):
        load_prompts("p.parquet")


def test_data_sets_give_prompts_and_images(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = [Image.new("RGB", (4, 4), (value, 8, 7)) for value in (9, 10)]
    data = datasets.Dataset.from_dict({"Prompt": ["a cat", ""], "image": images})
    (tmp_path / "set").mkdir()
    data.to_parquet(tmp_path / "set" / "test.parquet")
    prompts = load_prompts(str(tmp_path / "set"), split="test")
    assert prompts.entries == (("000000", "a cat"),) and prompts.skipped == 1
    images = Images.of_data_set(str(tmp_path / "set"), "test")
    assert len(images) == 2 and images.read(1)[:, 0, 0].tolist() == [10, 8, 7]
    with pytest.raises(EvaluationError, match="split 'none'"):
        load_prompts(str(tmp_path / "set"), split="none")


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": [1, 2, 3], "caption": ["a cat", None, "a dog"]})
    parquet.write_table(table, tmp_path / "p.parquet")
    prompts = load_prompts(str(tmp_path / "p.parquet"))
    assert [text for _, text in prompts.entries] == ["a cat", "a dog"] and prompts.skipped == 1
    with pytest.raises(EvaluationError, match="there are 'id', 'caption'"):
        load_prompts(str(tmp_path / "p.parquet"), column="text")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(EvaluationError, match="cannot read prompts from"):
        load_prompts(str(tmp_path / "broken.parquet"))


def test_noise_depends_on_the_item_alone():
    items = make_items([("000000", "a cat"), ("000001", "a cat"), ("000002", "a dog")], seeds=(0, 1))
    assert len({item.noise_seed() for item in items} | {item.noise_seed(10) for item in items}) == 12
    assert len({item.name for item in items}) == 6
    again = make_items([("000002", "a dog")], seeds=(1,))
    assert again[0] == items[-1] and again[0].noise_seed() == items[-1].noise_seed()
