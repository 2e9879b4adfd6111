"""The gate: what it declines stays untouched, what it lets through is merged, and it remembers."""

import json

import pytest
import torch
from conftest import INPUTS, make_unet
from diffusers.models.attention_processor import AttnProcessor

from tomesd_plus import AdaptiveRatio, apply_token_merging
from tomesd_plus.merging import gate
from tomesd_plus.merging.config import LAYERS
from tomesd_plus.merging.gate import Decision, Gate

pytestmark = pytest.mark.filterwarnings("error")  # what does not pay is no mistake of the user's


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tomesd_plus" / "gate.json"


@torch.no_grad()
def output(unet, timestep=700, batch=2):
    return unet(INPUTS["sample"][:batch], timestep, INPUTS["encoder_hidden_states"][:batch]).sample


def merged(**options):
    unet = make_unet()
    report = apply_token_merging(unet, **options)
    return output(unet), report


OPTIONS = [
    {"ratio": 0.5},
    {"ratio": 0.5, "layers": LAYERS},
    {"ratio": 0.5, "layers": "block"},
    {"ratio": 0.5, "layers": ["mlp"], "plan_per": "block"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_what_it_declines_stays_bit_identical_and_the_report_says_why(options, monkeypatch):
    monkeypatch.setattr(Gate, "decide", lambda self, key, device, whole, merged: Decision(1.0, 1.0))
    result, report = merged(**options, gate="on")
    assert torch.equal(result, output(make_unet()))
    assert not report.merged
    reasons = {str(layer.reason) for layer in report.layers if layer.downsample == 1}
    assert reasons == {"merging does not pay here (1.00 ms, untouched 1.00 ms)"}
    assert "Measured with 128 tokens less in 2 × 256 × 16 (batch, tokens, channels): merging does not" in str(report)


@pytest.mark.parametrize("options", OPTIONS)
def test_each_level_is_decided_by_itself(options, monkeypatch):
    def decide(self, key, *others):
        return Decision(1.0, 1.0) if " 8 × 8 tokens" in key else Decision(2.0, 1.0)

    monkeypatch.setattr(Gate, "decide", decide)
    result, report = merged(**options, max_downsample=2, gate="on")
    assert torch.equal(result, merged(**options)[0])
    assert not torch.equal(result, merged(**options, max_downsample=2)[0])
    assert {layer.downsample for layer in report.layers if layer.removed} == {1}


def test_the_report_says_what_was_measured_where_it_pays_too(monkeypatch):
    monkeypatch.setattr(Gate, "decide", lambda self, key, device, whole, merged: Decision(2.0, 1.0))
    _, report = merged(ratio=0.5, gate="on")
    assert report.merged and "merging pays here (1.00 ms, untouched 2.00 ms)" in str(report)


@pytest.mark.parametrize(
    ("ratio", "removed"),
    [(0.5, 128), (0.49, 96), (0.1, 16), (0.01, 2), (AdaptiveRatio(1.0, (0, 0.25, 0.5)), 64)],
)
def test_what_is_measured_is_at_most_what_is_merged(ratio, removed, monkeypatch):
    tokens = []

    def watch(self, key, device, whole, merged):
        hook = (
            unet.down_blocks[0]
            .attentions[0]
            .transformer_blocks[0]
            .attn1.to_q.register_forward_hook(lambda layer, args, out: tokens.append(out.shape[1]))
        )
        merged()
        hook.remove()
        return Decision(2.0, 1.0)

    monkeypatch.setattr(Gate, "decide", watch)
    unet = make_unet()
    apply_token_merging(unet, ratio=ratio, gate="on")
    output(unet)
    assert tokens == [256 - removed]


@pytest.mark.parametrize("options", OPTIONS)
def test_measuring_changes_nothing(options, monkeypatch):
    decide, runs = Gate.decide, []

    def measured(self, key, device, whole, merged):
        decide(self, key, device, lambda: runs.append(0) or whole(), lambda: runs.append(1) or merged())
        return Decision(2.0, 1.0)

    monkeypatch.setattr(Gate, "decide", measured)
    result, report = merged(**options, gate="on")
    expected, plain_report = merged(**options)
    assert torch.equal(result, expected)
    assert report.removed == plain_report.removed
    assert [layer.calls for layer in report.layers] == [layer.calls for layer in plain_report.layers]
    assert runs == [0, 1] * (1 + gate.REPEATS)  # one kind of block: three layers share what was measured


def test_both_ways_are_what_they_say(monkeypatch):
    """The gate's two ways of running a block take all tokens, and fewer."""
    tokens = {}

    def watch(self, key, device, whole, merged):
        for name, run in {"whole": whole, "merged": merged}.items():
            tokens[name] = []
            hook = block.attn1.to_q.register_forward_hook(
                lambda layer, args, out, n=name: tokens[n].append(out.shape[1])
            )
            run()
            hook.remove()
        return Decision(2.0, 1.0)

    monkeypatch.setattr(Gate, "decide", watch)
    unet = make_unet()
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    apply_token_merging(unet, ratio=0.5, gate="on")
    original = Gate.decide
    monkeypatch.setattr(
        Gate, "decide", lambda self, *args: original(self, *args) if not tokens else Decision(2.0, 1.0)
    )
    output(unet)
    assert tokens == {"whole": [256], "merged": [128]}


def test_decisions_are_kept_on_disk_and_measured_anew_on_demand(cache, monkeypatch):
    merged(ratio=0.5, gate="on")
    first = json.loads(cache.read_text())
    assert len(first) == 1 and all(times["untouched_ms"] > 0 < times["merged_ms"] for times in first.values())
    with monkeypatch.context() as patch:
        patch.setattr(gate, "_milliseconds", lambda device, run: pytest.fail("measured again"))
        merged(ratio=0.5, gate="on")
        with pytest.raises(pytest.fail.Exception):
            merged(ratio=0.5, gate="remeasure")
        with pytest.raises(pytest.fail.Exception):  # another batch is another kind
            unet = make_unet()
            apply_token_merging(unet, ratio=0.5, gate="on")
            output(unet, batch=1)
        with pytest.raises(pytest.fail.Exception):  # other kernels
            unet = make_unet()
            unet.set_attn_processor(AttnProcessor())
            apply_token_merging(unet, ratio=0.5, gate="on")
            output(unet)
    merged(ratio=0.25, gate="on")
    merged(ratio=0.5, gate="on", layers=["self_attention", "mlp"])
    assert len(json.loads(cache.read_text())) == 3


@pytest.mark.parametrize("content", ["", "[1]", '{"key": {"fast": true}}'])
def test_a_broken_file_is_measured_over(content, cache):
    cache.parent.mkdir()
    cache.write_text(content)
    merged(ratio=0.5, gate="on")
    assert len(json.loads(cache.read_text())) == 1


def test_a_folder_that_cannot_be_written_to_is_no_error(cache):
    cache.parent.write_text("a file where the folder should be")
    merged(ratio=0.5, gate="on")


def test_a_failure_while_measuring_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(gate, "_milliseconds", lambda device, run: run() or 1 / 0)
    unet = make_unet()
    apply_token_merging(unet, ratio=0.5, gate="on")
    with pytest.raises(ZeroDivisionError):
        output(unet)
    monkeypatch.undo()
    monkeypatch.setattr(Gate, "decide", lambda self, key, device, whole, merged: Decision(2.0, 1.0))
    assert torch.equal(output(unet), merged(ratio=0.5)[0])


@pytest.mark.parametrize(("whole", "with_merging", "pays"), [(2.0, 1.0, True), (1.01, 1.0, False), (1.0, 2.0, False)])
def test_it_pays_if_it_is_faster_than_noise(whole, with_merging, pays):
    assert Decision(whole, with_merging).pays is pays
