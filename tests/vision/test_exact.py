"""Against the paper's block written out, and that what is switched off is off."""

import pytest
import torch

from tests.vision_tools import KINDS, LAYERS, PATCHES, forward, make_tower, papers_forward, pictures
from tomesd_plus import apply_token_merging, remove_token_merging, token_merging


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("r", [4, 9, [PATCHES // 2, 0, 7, 3]])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_papers_block(kind, r, attention):
    model, prefix = make_tower(kind, attention), KINDS[kind][0]
    removed = r if isinstance(r, list) else [r] * LAYERS
    expected = papers_forward(model, pictures(), removed, prefix)
    untouched = forward(model)
    report = apply_token_merging(model, r=r)
    with torch.no_grad():
        output = model(pictures(), output_hidden_states=True)
    assert [layer.removed for layer in report.layers] == [*removed]
    assert len(output.hidden_states) == LAYERS + 1
    for ours, theirs in zip(output.hidden_states[1:], expected, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5
    assert (output.last_hidden_state - untouched).abs().max() > 1e-2
    torch.testing.assert_close(forward(model), output.last_hidden_state, rtol=0, atol=0)  # nobody looks at layers


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_removed_and_removal_are_bit_exact(kind):
    model = make_tower(kind)
    modules = {name: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for name, m in model.named_modules()}
    configs = {name: m.config for name, m in model.named_modules() if hasattr(m, "config")}
    untouched = forward(model)
    with token_merging(model, r=0) as report:
        assert torch.equal(forward(model), untouched) and not report.merged
    with token_merging(model, r=8) as report:
        assert not torch.equal(forward(model), untouched) and report.merged
        assert torch.equal(forward(model), forward(model))
    assert torch.equal(forward(model), untouched)
    after = {name: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert after == modules
    assert all(m.config is configs[name] for name, m in model.named_modules() if hasattr(m, "config"))
    with pytest.warns(UserWarning, match="nothing to remove"):
        remove_token_merging(model)
