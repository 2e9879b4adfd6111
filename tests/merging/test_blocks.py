"""Hooks on transformer blocks: whole blocks, chunks, and errors in the middle."""

import pytest
import torch
from conftest import make_unet, merge_in, plans_of
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0

from tomesd_plus import (
    apply_token_merging,
    remove_token_merging,
)
from tomesd_plus.merging.attachment import attachments_on


def test_a_block_merged_as_a_whole_adds_to_each_token_what_its_group_got():
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=16).eval()
    model = _OneBlock(block)
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    attachment = merge_in(model, ratio=0.5, layers="block", proportional_attention=False)
    with torch.no_grad():
        merged_output = model(x, text)
        plan = next(iter(plans_of(attachment).values()))
        attachment.detach()
        block.attn1.set_processor(AttnProcessor2_0())
        short = plan.merge(x)
        expected = x + plan.unmerge(block(short, encoder_hidden_states=text) - short)
    assert plan.removed == 32
    torch.testing.assert_close(merged_output, expected)


def test_whole_blocks_are_left_alone_where_places_matter_with_checkpointing_too():
    for checkpointing in (False, True):
        unet = make_unet(attention_type="gated").train(checkpointing)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        report = apply_token_merging(unet, ratio=0.5, layers="block")
        gligen = {
            "boxes": torch.rand(2, 3, 4),
            "positive_embeddings": torch.randn(2, 3, 16),
            "masks": torch.ones(2, 3),
        }
        inputs = torch.randn(2, 4, 16, 16), 500, torch.randn(2, 7, 16)
        unet(*inputs, cross_attention_kwargs={"gligen": gligen})
        with pytest.warns(UserWarning, match="merged nothing: it looks at places in the picture"):
            assert not report.merged
        assert not report.merged and "it looks at places in the picture" in str(report)


def test_chunked_feed_forward_is_not_lengthened():
    """Chunks as long as a merged sequence must not be taken for one."""
    unet = make_unet()
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 16)
    for block in [*unet.down_blocks[0].modules(), *unet.up_blocks[1].modules()]:  # where there are 256 tokens
        if isinstance(block, BasicTransformerBlock):
            block.set_chunk_feed_forward(128, dim=1)
    report = apply_token_merging(unet, ratio=0.5, layers=["self_attention", "mlp"], max_downsample=1)
    assert unet(sample, 500, text).sample.shape == sample.shape and report.merged


def test_an_error_in_the_middle_of_a_call_leaves_nothing_running():
    unet = make_unet()
    apply_token_merging(unet, ratio=0.5, layers="block")
    block = unet.down_blocks[0].attentions[0].transformer_blocks[0]
    x, text = torch.randn(2, 256, 16), torch.randn(2, 7, 16)
    failing = block.ff.register_forward_pre_hook(lambda layer, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unet(torch.randn(2, 4, 16, 16), 500, text)
    failing.remove()
    (attachment,) = attachments_on(unet)
    current = attachment.decider.current
    assert not current.call.running and current.block.entered is None  # no activation is held
    with torch.no_grad():
        by_itself = block(x, encoder_hidden_states=text)
        remove_token_merging(unet)
        assert torch.equal(by_itself, block(x, encoder_hidden_states=text))


class _OneBlock(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, text):
        return self.block(x, encoder_hidden_states=text)
