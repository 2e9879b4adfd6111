"""The code that makes a candidate's picture, ready to copy: a script that gives the same pixels."""

import json
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from gradio_app.settings import Picture
from tomesd_plus import FeatureCacheConfig, Schedule, ToMeConfig
from tomesd_plus.evaluation.names import TINY


def snippet(
    picture: Picture,
    merging: ToMeConfig | None,
    cache: FeatureCacheConfig | None,
    preset: str | None = None,
    model: str = TINY,
    device: str = "cpu",
    dtype: str = "float32",
    force: bool = False,
) -> str:
    """A script that makes a picture.

    Args:
        picture: Prompt, seed and the like.
        merging, cache: What to switch on; ``None``: nothing.
        preset: The name that stands for both.
        model, device, dtype: What :func:`~tomesd_plus.evaluation.generation.load_model` takes; the dtype by its name.
        force: The preset would be refused otherwise.

    Returns:
        Python. It saves the picture as ``picture.png``.
    """
    imports, load = _loading(model, device, dtype)
    names, contexts = set(imports), []
    if preset is not None:
        names.add("preset")
        contexts.append(f"preset(pipe, {constructor(preset)}{', force=True' if force else ''})")
    else:
        for function, config in (("token_merging", merging), ("feature_cache", cache)):
            if config is not None:
                names |= {function, *_classes(config)}
                contexts.append(f"{function}(pipe, {constructor(config)})")
    arguments = [
        constructor(picture.prompt),
        *([f"negative_prompt={constructor(picture.negative_prompt)}"] if picture.negative_prompt else []),
        f"num_inference_steps={picture.steps}, guidance_scale={picture.guidance_scale!r}",
        f"height={picture.height}, width={picture.width}",
        f"generator=torch.Generator().manual_seed({picture.seed})",
    ]
    call = ["image = pipe(", *(f"    {argument}," for argument in arguments), ").images[0]"]
    if contexts:
        call = [f"with {', '.join(contexts)}:", *(f"    {line}" for line in call)]
    lines = ["import torch"]
    if "AutoPipelineForText2Image" in names:
        lines.append("from diffusers import AutoPipelineForText2Image")
    own = sorted(names - {"AutoPipelineForText2Image", "load_model"})
    lines += [f"from tomesd_plus import {', '.join(own)}"] if own else []
    lines += ["from tomesd_plus.evaluation.generation import load_model"] if "load_model" in names else []
    return "\n".join([*lines, "", load, *call, 'image.save("picture.png")', ""])


def constructor(value: Any) -> str:
    """A value as code: of a configuration what differs from its defaults, and always the ratio, schedule and interval.

    Example:
        >>> constructor(ToMeConfig(ratio=0.5, layers="block"))
        'ToMeConfig(ratio=0.5, metric="block_input", layers="block")'
    """
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if not is_dataclass(value):
        return repr(value)
    arguments = []
    for field in fields(value):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        always = isinstance(value, Schedule) or field.name in ("ratio", "interval")
        if always or getattr(value, field.name) != default:
            arguments.append(f"{field.name}={constructor(getattr(value, field.name))}")
    return f"{type(value).__name__}({', '.join(arguments)})"


def _classes(value: Any) -> Iterator[str]:
    """The classes that :func:`constructor` names."""
    if is_dataclass(value):
        yield type(value).__name__
        for field in fields(value):
            yield from _classes(getattr(value, field.name))


def _loading(model: str, device: str, dtype: str) -> tuple[list[str], str]:
    """What to import, and the line that loads the pipeline."""
    if model == TINY:
        options = "" if (device, dtype) == ("cpu", "float32") else f"torch.{dtype}, {device!r}"
        return ["load_tiny_pipeline"], f"pipe = load_tiny_pipeline({options})"
    if model.endswith(".safetensors"):
        return ["load_model"], f"pipe = load_model({model!r}, {device!r}, torch.{dtype})"
    load = f"pipe = AutoPipelineForText2Image.from_pretrained({model!r}, torch_dtype=torch.{dtype}).to({device!r})"
    return ["AutoPipelineForText2Image"], load
