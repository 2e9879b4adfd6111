"""What merging did in a tower's latest forward pass: tokens by layer, and which patches went together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tomesd_plus.vision.attachment import Attachment
from tomesd_plus.vision.call import Call
from tomesd_plus.vision.methods import METHODS
from tomesd_plus.vision.picture import draw_groups


@dataclass(frozen=True)
class LayerTokens:
    """One layer.

    Args:
        name: In the model.
        before: Tokens that it took, class and register tokens counted.
        after: Tokens that it left, likewise.
        reason: Why it removed fewer than were asked for, if it did.
    """

    name: str
    before: int
    after: int
    reason: str | None = None

    @property
    def removed(self) -> int:
        """Tokens that it removed."""
        return self.before - self.after


class TowerReport:
    """A live view of what merging does to a model's vision towers; it always tells of the latest forward pass.

    Args:
        attachments: Of the towers.
    """

    def __init__(self, attachments: Sequence[Attachment]) -> None:
        self._attachments = {each.tower: each for each in attachments}

    @property
    def towers(self) -> list[str]:
        """Names of the towers in the model; an empty one is the model itself."""
        return list(self._attachments)

    @property
    def layers(self) -> list[LayerTokens]:
        """Every layer that has run, in order."""
        return [layer for each in self._attachments.values() for layer in _layers(each)]

    @property
    def removed(self) -> float:
        """Share of the patch tokens removed in all, in [0, 1), over the towers that have run."""
        calls = [call for each in self._attachments.values() if (call := each.latest.value) and call.sequences]
        patches = sum(call.sequences[0].tokens - call.prefix for call in calls)
        return (
            sum(call.sequences[0].tokens - call.sequences[-1].tokens for call in calls) / patches if patches else 0.0
        )

    @property
    def merged(self) -> bool:
        """True if any token was removed."""
        return self.removed > 0

    @property
    def left_alone(self) -> dict[str, str]:
        """Why towers or layers kept tokens that were to go, by their names."""
        towers = {
            each.tower or "the model": call.reason
            for each in self._attachments.values()
            if (call := each.latest.value) and call.reason
        }
        return towers | {layer.name: layer.reason for layer in self.layers if layer.reason}

    def source_map(self, layer: int = -1, tower: str | None = None) -> Tensor:
        """Which patches went together: those with the same number are one token.

        Args:
            layer: After which layer; the last by default.
            tower: In a model with several, the name of one; the first by default.

        Returns:
            (batch, rows, columns) of the latest forward pass's patches, int64, on the CPU; in one row if the tower was
            given tokens instead of pictures.

        Raises:
            ValueError: The tower has not run, or has no such layer.
        """
        attachment = self._tower(tower)
        call = attachment.latest.value
        if call is None or not call.sequences:
            raise ValueError("the tower has not run since merging was applied: call the model first")
        count = len(attachment.names)
        if isinstance(layer, bool) or not -count <= layer < count:
            raise ValueError(f"the tower has {count} layers, so there is no layer {layer!r}")
        sequence = call.sequences[min(layer % count + 1, len(call.sequences) - 1)]  # a call may be left alone
        rows, columns = call.grid or (1, call.sequences[0].tokens - call.prefix)
        if sequence.inverse is None:
            return torch.arange(rows * columns).reshape(1, rows, columns).repeat(call.batch, 1, 1)
        groups = sequence.inverse[:, call.prefix :] - call.prefix
        return groups.reshape(-1, rows, columns).cpu()

    def source_picture(self, picture: Any, layer: int = -1, sample: int = 0, tower: str | None = None) -> Image.Image:
        """Draw which patches went together: each group in its mean colour, with outlines, as ToMe's authors show it.

        Args:
            picture: What the model was given as one sample: a PIL picture, or (3, height, width) or (height, width, 3)
                in any range, for example a row of ``pixel_values``.
            layer: As in :meth:`source_map`.
            tower: As there.
            sample: Of the batch.

        Returns:
            A picture of about the same size, at least eight pixels a patch.

        Raises:
            ValueError: As in :meth:`source_map`, or the batch had no such sample.
        """
        groups = self.source_map(layer, tower)
        if isinstance(sample, bool) or not -len(groups) <= sample < len(groups):
            raise ValueError(f"the batch had {len(groups)} pictures, so there is no sample {sample!r}")
        return draw_groups(groups[sample].numpy(), picture)

    def _tower(self, name: str | None) -> Attachment:
        if name is not None and name not in self._attachments:
            raise ValueError(f"no tower {name!r}: choose from {', '.join(map(repr, self._attachments))}")
        return next(iter(self._attachments.values())) if name is None else self._attachments[name]

    def __str__(self) -> str:
        if not self.layers and not self.left_alone:
            return "Token merging: the model has not run yet."
        lines = [f"{'layer':<48} {'before':>6} {'after':>6}  fewer than asked for because"]
        for layer in self.layers:
            lines.append(f"{layer.name:<48} {layer.before:>6} {layer.after:>6}  {layer.reason or ''}".rstrip())
        for each in self._attachments.values():
            if each.latest.value and each.latest.value.reason:
                lines.append(f"{each.tower or 'the model'} is left alone: {each.latest.value.reason}.")
        return "\n".join([*lines, f"Patch tokens removed: {self.removed:.1%}."])


def _layers(attachment: Attachment) -> list[LayerTokens]:
    call = attachment.latest.value
    if call is None or not call.sequences:
        return []
    pairs = zip(call.sequences, call.sequences[1:], strict=False)
    return [
        LayerTokens(name, before.tokens, after.tokens, _why_fewer(call, index, before.tokens, after.tokens))
        for index, (name, (before, after)) in enumerate(zip(attachment.names, pairs, strict=False))
    ]


def _why_fewer(call: Call, layer: int, before: int, after: int) -> str | None:
    config = call.config
    if config.adaptive and before > after:
        return None
    if config.similarity is not None:
        return f"too few tokens have a partner of similarity {config.similarity:g}"
    if config.adaptive:
        return "sampling met nearly every token"
    wanted = config.removed(layer, call.layers, call.sequences[0].tokens - call.prefix)
    if before - after >= wanted:
        return None
    most = METHODS[config.method].most(before, call.leading)
    return f"{wanted} were asked for, {most} can go: {call.leading} of {before} are protected"
