"""Token merging around the modules of a tower, whose forwards run as they are.

A layer computes y = x + f(norm(x)), with x of all tokens before and y of all after. Merging before the norm and
unmerging after f leaves x too long, but merging is linear and merging what was unmerged gives it back, so

    merge(x + unmerge(f(norm(merge(x))))) = merge(x) + f(norm(merge(x)))

is what Bolya et al. compute ("Token Merging: Your ViT But Faster", https://arxiv.org/abs/2210.09461): a hook before
the norm, one after the MLP, one after the layer.
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from tomesd_plus.host.arguments import first
from tomesd_plus.host.say import warn
from tomesd_plus.vision.attachment import Attachment
from tomesd_plus.vision.call import KEY, Call, LayerCall
from tomesd_plus.vision.methods import METHODS

with suppress(ImportError):  # in versions where merging is refused
    from transformers.utils import output_capturing


class Hook:
    """One hook.

    Args:
        attachment: The tower's.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment


class AfterPatches(Hook):
    """Notes rows and columns of the grid."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.attachment.current.grid = (output.shape[-2], output.shape[-1])


class BeforeStack(Hook):
    """Begins a forward pass."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attachment = self.attachment
        call = Call(attachment.config, len(attachment.names), attachment.prefix)
        attachment.latest.value = call
        return args, kwargs | {KEY: call}


class BeforeLayer(Hook):
    """Gives a layer its part of the forward pass, the sizes of its tokens and their places.

    Args:
        attachment: The tower's.
        index: Of the layer.
        heads: Of its attention.
    """

    def __init__(self, attachment: Attachment, index: int, heads: int) -> None:
        super().__init__(attachment)
        self.index, self.heads = index, heads

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        call: Call | None = kwargs.pop(KEY, None)
        if call is None:  # a layer that is called by itself
            return None
        hidden_states = first(args, kwargs, "hidden_states")
        if self.index == 0 and not call.sequences:  # not in a second run for gradients
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            call.grid, self.attachment.current.grid = self.attachment.current.grid, None
            call.begin(hidden_states, mask is not None)
            if call.reason is not None and getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)():
                raise RuntimeError(
                    f"token merging cannot be exported, for {call.reason}, which transformers makes for torch.export: "
                    "use torch.compile, or torch.jit.trace for one batch size, or remove_token_merging first"
                )
            if call.reason is not None and not self.attachment.warned:
                self.attachment.warned = True
                warn(f"Token merging does nothing in this call: {call.reason}.", stacklevel=2)
        if call.reason is not None:
            return args, kwargs
        before = call.sequences[self.index]
        step = LayerCall(call, self.index, self._removed(call, before.tokens), self.heads)
        if before.kept is None:
            return args, kwargs | {KEY: step}
        if hidden_states.shape[1] != before.tokens:  # the layer before has given it out at full length
            hidden_states = before.again(hidden_states)
        if kwargs.get("position_embeddings") is not None:
            patches = before.kept[:, call.prefix :] - call.prefix
            kwargs["position_embeddings"] = tuple(table[patches][:, None] for table in kwargs["position_embeddings"])
        return (hidden_states, *args[1:]), kwargs | {KEY: step}

    def _removed(self, call: Call, tokens: int) -> int | None:
        config = self.attachment.config
        if config.adaptive:
            return None
        wanted = config.removed(self.index, call.layers, call.sequences[0].tokens - call.prefix)
        return min(wanted, METHODS[config.method].most(tokens, call.leading))


class BeforeAttention(Hook):
    """Tells the hooks inside the layer, which are not shown its arguments, which part of which pass runs."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.attachment.current.layer = kwargs.get(KEY)


class AfterKeys(Hook):
    """Keeps the keys until the plan is made."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        layer = self.attachment.current.layer
        if layer is not None and not layer.planned:
            layer.keys = output


class BeforeNorm(Hook):
    """Merges, unless a layer that was not finished has left its part, and the norm is called by itself."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        layer = self.attachment.current.layer
        if layer is None or args[0].shape[:2] != (layer.call.batch, layer.before.tokens):
            return None
        plan = layer.make_plan()
        return None if plan is None else (plan.merge(args[0]), *args[1:])


class AfterMlp(Hook):
    """Unmerges, with the same exception."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        layer, self.attachment.current.layer = self.attachment.current.layer, None
        plan = None if layer is None else layer.plan
        return None if plan is None or output.shape[:2] != plan.kept.shape else plan.unmerge(output)


class AfterLayer(Hook):
    """Merges what the layer returns; brings all tokens back where anybody looks, and after the last layer."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        step: LayerCall | None = kwargs.get(KEY)
        if step is None:
            return None
        sequence = step.before
        if step.plan is not None:
            output = step.plan.merge(output)
            sequence = sequence.after(step.plan)
        if len(step.call.sequences) == step.index + 1:  # else a second run for gradients
            step.call.sequences.append(sequence)
        last = step.index == step.call.layers - 1
        return sequence.dense(output) if last or _is_watched(module) else output


def _is_watched(layer: nn.Module) -> bool:
    """True if somebody looks at a layer's output: transformers' capture of hidden states, or a hook of a user's."""
    for hook in layer._forward_hooks.values():
        if not isinstance(hook, Hook) and (
            getattr(hook, "__module__", "") != output_capturing.__name__ or _captures()
        ):
            return True
    return False


def _captures() -> bool:
    """True unless transformers' hooks, which stay on once they were needed, are seen to be idle."""
    collector = getattr(output_capturing, "_active_collector", None)
    return collector is None or "hidden_states" in (collector.get() or ())


def hooks_on(modules: Iterable[nn.Module]) -> list[tuple[dict[int, Any], int, Hook]]:
    """All hooks of ours on modules, with the dictionaries in which they stand and their keys."""
    found: list[tuple[dict[int, Any], int, Hook]] = []
    for module in modules:
        registries: tuple[Any, Any] = (module._forward_pre_hooks, module._forward_hooks)
        for hooks in registries:
            found += [(hooks, key, hook) for key, hook in hooks.items() if isinstance(hook, Hook)]
    return found
