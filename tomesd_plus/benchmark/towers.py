"""Vision towers with the shapes of published models and random weights, their settings and their ideal."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tomesd_plus.benchmark.settings import IDEAL, UNTOUCHED, Setting
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.host.clock import seconds_of
from tomesd_plus.vision.apply import merge_towers, unmerge_towers
from tomesd_plus.vision.config import TowerConfig
from tomesd_plus.vision.methods import METHODS
from tomesd_plus.vision.towers import towers_of

BATCH = 8


@dataclass(frozen=True)
class TowerShape:
    """A vision tower's configuration, from the published model.

    Args:
        kind: Names of transformers' model and config, without ``Model`` and ``Config``.
        config: Arguments of the config.
        image_size: Height and width of the pictures that it is measured on, pixels.
    """

    kind: str
    config: dict[str, Any]
    image_size: int = 224

    def build(self, size: int, dtype: torch.dtype, device: torch.device | str) -> Any:
        """The tower with random weights, the same each time, for pictures of ``size`` pixels."""
        config = getattr(transformers, f"{self.kind}Config")(image_size=size, **self.config)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, f"{self.kind}Model")(config)
        return model.to(device, dtype).eval().requires_grad_(False)


def _shape(width: int, layers: int, patch: int) -> dict[str, Any]:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64, "patch_size": patch,
    }  # fmt: skip


TOWERS = {
    "vit-b16": TowerShape("ViT", {**_shape(768, 12, 16), "intermediate_size": 3072}),
    "vit-l16": TowerShape("ViT", {**_shape(1024, 24, 16), "intermediate_size": 4096}),
    "clip-b32": TowerShape("CLIPVision", {**_shape(768, 12, 32), "intermediate_size": 3072}),
    "clip-l14": TowerShape("CLIPVision", {**_shape(1024, 24, 14), "intermediate_size": 4096}),
    "dinov2-s": TowerShape("Dinov2", _shape(384, 12, 14), image_size=518),
    "vit-tiny": TowerShape("ViT", {**_shape(64, 2, 8), "intermediate_size": 64}, image_size=32),  # for tests
}


@dataclass(frozen=True)
class TowerSetting(Setting):
    """A way of running a vision tower.

    Args:
        name: A method's, or that of an ideal.
        r: As in :func:`~tomesd_plus.apply_token_merging`.
    """

    switches: dict[str, dict[str, Any]] = field(default_factory=lambda: {"tower": {}})
    r: Any = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Name, r and nothing, as they stand in tables."""
        r = f"({self.r[0]}, {self.r[1]:g})" if isinstance(self.r, tuple) else str(self.r)
        return self.name, f"r = {r}", ""

    @property
    def ideal(self) -> Setting | None:
        """As few tokens at no cost."""
        return None if self.name == IDEAL_TOWER else TowerSetting(IDEAL_TOWER, {"ideal": {}}, r=self.r)

    @property
    def note(self) -> str:
        """The version of transformers."""
        return f"transformers {transformers.__version__}"

    def check(self) -> None:
        """Raise an EvaluationError if an option is wrong."""
        try:
            self.config()
        except (TypeError, ValueError) as error:
            raise EvaluationError(f"{self.name}, r = {self.r}: {error}") from error

    def config(self) -> TowerConfig:
        """What is merged; an ideal's layers lose as many as merging's."""
        return TowerConfig(r=self.r, method="merging" if self.name == IDEAL_TOWER else self.name)

    @contextmanager
    def switched_on_tower(self, tower: nn.Module) -> Iterator[None]:
        """Apply the setting inside a ``with`` block."""
        if self.name == IDEAL_TOWER:
            with fewer_tokens_at_no_cost(tower, self.config()):
                yield
            return
        merge_towers(tower, self.config())
        try:
            yield
        finally:
            unmerge_towers(tower)


IDEAL_TOWER = f"{IDEAL}fewer tokens"


def tower_settings(methods: Sequence[str], rs: Sequence[Any]) -> list[Setting]:
    """The untouched tower, then each method at each r, after its ideal.

    Example:
        >>> [setting.key[:2] for setting in tower_settings(["merging"], [8, (8, -1)])][1:]
        [('ideal: fewer tokens', 'r = 8'), ('merging', 'r = 8'), ('ideal: fewer tokens', 'r = (8, -1)'), ('merging', 'r = (8, -1)')]
    """  # noqa: E501
    chosen: dict[tuple[str, str, str], Setting] = {UNTOUCHED.key: UNTOUCHED}
    for r in rs:
        for method in methods:
            if method not in METHODS:
                raise EvaluationError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
            setting = TowerSetting(method, r=r)
            setting.check()
            for each in (setting.ideal, setting):
                if each is not None:
                    chosen.setdefault(each.key, each)
    return list(chosen.values())


@contextmanager
def fewer_tokens_at_no_cost(model: nn.Module, config: TowerConfig) -> Iterator[None]:
    """Let each layer's MLP, and all layers after it, run on the first tokens only, inside a ``with`` block.

    The result is meaningless, but its time is what removing so many tokens saves if it costs nothing: tokens are cut
    off as views, and zeros stand in for those that an MLP has not seen. Not for ``torch.compile``.
    """
    [tower] = towers_of(model)
    handles: list[Any] = []
    zeros: dict[tuple[int, ...], Tensor] = {}
    layers: list[Any] = list(tower.layers.values())
    at_first = [0]

    def begin(module: nn.Module, args: Any) -> None:
        at_first[0] = args[0].shape[1]

    def cut(index: int) -> Any:
        def left(tokens: int) -> int:
            wanted = config.removed(index, len(layers), at_first[0] - tower.prefix)
            return tokens - min(wanted, METHODS[config.method].most(tokens, tower.prefix))

        def before_norm(module: nn.Module, args: Any) -> Any:
            return (args[0][:, : left(args[0].shape[1])],)

        def after_mlp(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            shape = (len(output), layers[index].tokens, output.shape[2])
            if shape not in zeros:
                zeros[shape] = output.new_zeros(shape)
            return zeros[shape]

        def before_layer(module: Any, args: Any) -> None:
            module.tokens = args[0].shape[1]

        def after_layer(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output[:, : left(output.shape[1])]

        return before_layer, before_norm, after_mlp, after_layer

    handles.append(layers[0].register_forward_pre_hook(begin))
    for index, layer in enumerate(layers):
        before_layer, before_norm, after_mlp, after_layer = cut(index)
        handles.append(layer.register_forward_pre_hook(before_layer))
        handles.append(getattr(layer, tower.family.norm).register_forward_pre_hook(before_norm))
        handles.append(layer.mlp.register_forward_hook(after_mlp))
        handles.append(layer.register_forward_hook(after_layer))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TowerRunner:
    """A tower with a setting switched on.

    Args:
        model: The tower.
        pictures: What it is called with.
    """

    def __init__(self, model: Any, pictures: Tensor) -> None:
        self.model, self.pictures = model, pictures

    def run(self, calls: int) -> float:
        """The time of so many calls in seconds."""

        def work() -> None:
            for _ in range(calls):
                self.model(self.pictures)

        return seconds_of(work, self.pictures.device)


@contextmanager
def tower_runner(model: nn.Module, setting: Setting, size: int, batch: int, compiled: bool) -> Iterator[TowerRunner]:
    """A copy of a tower that shares its weights, with a setting switched on."""
    tensors = (*model.parameters(), *model.buffers())
    own = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    first = next(model.parameters())
    pictures = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(first)
    with setting.switched_on_tower(own) if isinstance(setting, TowerSetting) else nullcontext():
        yield TowerRunner(torch.compile(own, fullgraph=True) if compiled else own, pictures)
