"""The attention processors of transformers: a plain one for PixArt, one for joint attention with text."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor

from tomesd_plus.host.joint_attention import (
    ANY_HEADS,
    Rotary,
    Tokens,
    is_known,
    joint_attention,
    register_joint_processor,
)
from tomesd_plus.matching import MergePlan
from tomesd_plus.merging.answers import AlreadyMerged, Answer, Leave, Reason, Why
from tomesd_plus.merging.attachment import Attachment
from tomesd_plus.merging.config import ToMeConfig
from tomesd_plus.merging.processor import ToMeProcessor

Output = Tensor | tuple[Tensor, Tensor]
"""The image's tokens; of joint attention also the text's."""


class TransformerProcessor(ToMeProcessor):
    """Merges around PixArt's self-attention; put on by :func:`~tomesd_plus.apply_token_merging` only.

    Args:
        inner: The processor to merge around.
        attachment: Of the model. Without one, as the host's loaders make processors anew, nothing is merged.
    """

    def __init__(self, inner: Any = None, attachment: Attachment | None = None) -> None:
        self.inner = inner if inner is not None else FluxAttnProcessor()  # only Flux's loaders make them anew
        self.attachment = attachment if attachment is not None else Attachment(ToMeConfig())
        self.default = attachment is None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # nothing waits for a first call: the hooks are on the model, and on its copy


class JointToMeProcessor(TransformerProcessor):
    """Merges image tokens around the attention of Stable Diffusion 3 and Flux; text tokens never.

    As a pair of classes of the host do, it has an attention backend and a parallel configuration where the processor
    that was there before has them.
    """

    @property
    def _attention_backend(self) -> Any:
        return self.inner._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.inner._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.inner._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.inner._parallel_config = config

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
        **kwargs: Any,
    ) -> Output:
        """Attend, with fewer image tokens where that is understood; takes and returns what the inner one does."""
        given = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
            **kwargs,
        }
        given = {name: value for name, value in given.items() if value is not None}
        decider = self.attachment.decider
        call = decider.call()
        if call is None or not decider.serves(attn):
            self.attachment.came_back(attn)
        # Flux's single blocks hand text and image over as one sequence, the text first.
        text = call.text_tokens if call is not None and has_text_inside(attn) else 0
        answer = self._answer(attn, hidden_states[:, text:], given)
        if isinstance(answer, Leave):
            output: Output = self.inner(attn, hidden_states, **given)
            if answer.keep_in is not None:
                answer.done(output[0] if isinstance(output, tuple) else output[:, text:])
            return output
        if isinstance(answer, AlreadyMerged):
            merged = self._tokens(hidden_states, image_rotary_emb, answer.plan, text, encoder_hidden_states)
            return self._attend_jointly(attn, merged, merged, encoder_hidden_states, answer.plan, text)
        shorter = answer.merge(hidden_states[:, text:])
        if text:
            shorter = torch.cat([hidden_states[:, :text], shorter], dim=1)
        sides = self.attachment.config.sides
        whole = Tokens(hidden_states, image_rotary_emb)
        merged = self._tokens(shorter, image_rotary_emb, answer.plan, text, encoder_hidden_states)
        queries, keys = whole if sides == "keys_values" else merged, whole if sides == "queries" else merged
        output = self._attend_jointly(attn, queries, keys, encoder_hidden_states, answer.plan, text)
        if sides == "keys_values":
            return output
        if isinstance(output, tuple):
            return answer.unmerge(output[0]), output[1]
        image = answer.unmerge(output[:, text:])
        return torch.cat([output[:, :text], image], dim=1) if text else image

    def _answer(self, attn: Any, image: Tensor, given: dict[str, Any]) -> Answer:
        """What is to be done with the image's tokens."""
        decider = self.attachment.decider
        pair = decider.current.block.pair
        if pair is not None and has_text_inside(attn):  # it was decided for attention and MLP together
            return Leave() if isinstance(pair, Leave) else AlreadyMerged(pair.plan)
        obstacle = Reason(Why.not_tokens) if image.ndim != 3 else why_not_merged(attn, given)
        # The attention that Stable Diffusion 3.5 adds to its first blocks is among the image's tokens alone.
        added = not isinstance(attn, FluxAttention) and attn.added_kv_proj_dim is None
        return decider.ask(attn, "more_attention" if added else "self_attention", image, obstacle)

    def _tokens(
        self, hidden_states: Tensor, rotary: Rotary | None, plan: MergePlan, text: int, encoder: Tensor | None
    ) -> Tokens:
        """Merged tokens with the rotary embeddings of their destinations."""
        if rotary is None:
            return Tokens(hidden_states)
        length = text if encoder is None else encoder.shape[1]
        cosine, sine = (
            torch.cat([each[:length].expand(plan.batch, -1, -1), each[length:][plan.kept]], dim=1) for each in rotary
        )
        return Tokens(hidden_states, (cosine, sine))

    def _attend_jointly(
        self, attn: Any, queries: Tokens, keys: Tokens, encoder: Tensor | None, plan: MergePlan, text: int
    ) -> Output:
        config, sizes = self.attachment.config, None
        if config.proportional_attention and config.sides != "queries":
            sizes = plan.sizes
            if text:
                sizes = torch.cat([sizes.new_ones(len(sizes), text), sizes], dim=1)
        backend = getattr(self.inner, "_attention_backend", None)
        return joint_attention(attn, queries, keys, encoder, sizes, backend)


register_joint_processor(TransformerProcessor)
register_joint_processor(JointToMeProcessor)


def has_text_inside(attn: Any) -> bool:
    """True for an attention layer of Flux's single blocks, whose sequence begins with the text."""
    return isinstance(attn, FluxAttention) and attn.added_kv_proj_dim is None


def why_not_merged(attn: Any, given: dict[str, Any]) -> Reason | None:
    """Why an attention layer of joint attention is not understood in a call, and so left alone.

    Args:
        attn: The layer, with a :class:`JointToMeProcessor`.
        given: The arguments of its call, but for the image's tokens.
    """
    inner = attn.processor.inner
    if given.get("attention_mask") is not None:
        return Reason(Why.mask)
    own = sorted(given.keys() - {"encoder_hidden_states", "attention_mask", "image_rotary_emb"})
    if own:
        return Reason(Why.own_arguments, (", ".join(own),))
    if not is_known(inner):
        return Reason(Why.unknown_processor, (type(inner).__name__,))
    if isinstance(attn, FluxAttention) and attn.fused_projections:  # Stable Diffusion 3 has a processor for them
        return Reason(Why.all_fused)
    if getattr(inner, "_parallel_config", None) is not None:
        return Reason(Why.parallel)
    backend = getattr(inner, "_attention_backend", None)
    if backend is not None and backend not in ANY_HEADS:
        return Reason(Why.backend, (backend.value,))
    return None
