"""The arguments of ``tune``, checked before anything runs."""

import inspect
from collections.abc import Sequence
from typing import Any

from tomesd_plus.schedules.checks import is_number, is_whole

RESERVED = {"prompt", "generator", "output_type", "num_inference_steps", "guidance_scale", "return_dict"}


def checked(
    prompts: Any,
    speedup: Any,
    psnr: Any,
    steps: Any,
    seed: Any,
    kind: Any,
    most: Any,
    batch: Any,
    call: dict[str, Any],
) -> list[float]:
    """The speed-ups that are wanted; raises ValueError in words where an argument is wrong."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"prompts must be a list of at least one text, not {prompts!r}")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be texts")
    if (speedup is None) == (psnr is None):
        raise ValueError("give either speedup or psnr")
    if psnr is not None and not (is_number(psnr) and 0 < psnr < 100):
        raise ValueError(f"psnr must be a number of dB between 0 and 100, not {psnr!r}")
    wanted = [] if speedup is None else list(speedup) if isinstance(speedup, Sequence) else [speedup]
    if psnr is None and (not wanted or not all(is_number(each) and each > 1 for each in wanted)):
        raise ValueError(f"speedup must be a number larger than 1, or several, not {speedup!r}")
    for name, value, least in (("num_inference_steps", steps, 2), ("seed", seed, 0), ("batch_size", batch, 1)):
        if not (is_whole(value, least) or (name == "num_inference_steps" and value is None)):
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if kind not in ("kept", "free"):
        raise ValueError(f"steps must be 'kept' or 'free', not {kind!r}")
    if not is_number(most) or most < 5:
        raise ValueError(f"max_generations must be a number of at least 5, not {most!r}")
    if reserved := sorted(RESERVED & set(call)):
        raise ValueError(f"tune sets {', '.join(reserved)} itself: give prompts, seed and its own arguments")
    return wanted


def default_steps(pipe: Any) -> int:
    """The number of steps that a pipeline's call has by default."""
    given = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    if given is None or not isinstance(given.default, int):
        raise ValueError("give num_inference_steps: this pipeline has no default")
    return given.default
