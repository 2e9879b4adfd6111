"""The PSNR of each setting on the embedded pipeline, because a speed-up means little without it; cached in a file."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tomesd_plus.benchmark.settings import UNTOUCHED, Setting
from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.file_io import read_json, write_json
from tomesd_plus.evaluation.generation.compare import compare
from tomesd_plus.evaluation.generation.models import usual_guidance
from tomesd_plus.evaluation.generation.sampling import Sampling
from tomesd_plus.evaluation.names import TINY
from tomesd_plus.tiny import held_out_captions, load_tiny_pipeline
from tomesd_plus.version import __version__


def embedded_psnr(
    settings: Sequence[Setting],
    path: Path,
    device: torch.device,
    prompts: int = 4,
    steps: int = 25,
    on_step: Callable[[str], None] | None = None,
) -> dict[tuple[str, str, str], float]:
    """Mean PSNR in dB against the untouched pipeline's images of the same prompts and seeds, by the settings' keys.

    It runs in float32. The embedded pipeline has self-attention at full resolution, so levels are counted from there.

    Args:
        settings: Ideals, settings with a gate or of vision towers, and packages not installed are skipped.
        path: The JSON file that caches results; entries are valid for the same prompts, steps and version.
        device: Where to run the pipeline.
        prompts: Number of held-out captions; 0 for cached results only.
        steps: Denoising steps.
        on_step: Called with a setting's name after each step.

    Returns:
        PSNR by setting key.
    """
    sampling = Sampling(steps, usual_guidance(TINY))
    guidance = f"guidance {sampling.guidance_scale:g}"
    conditions = f"{prompts} prompts, {steps} steps, {guidance}, tomesd_plus {__version__}"
    kept = read_json(path) if path.exists() else {}
    wanted = {_name(setting, conditions): setting for setting in settings if _can_generate(setting)}
    missing = {name: setting for name, setting in wanted.items() if name not in kept}
    if missing and prompts:
        compared = [replace(setting.configuration(), name=name) for name, setting in missing.items()]
        with torch.random.fork_rng():
            torch.manual_seed(0)  # tomesd draws from the global generator
            pipe = load_tiny_pipeline(device=device)
            pipe.set_progress_bar_config(disable=True)
            made = compare(pipe, held_out_captions()[:prompts], compared, sampling, on_step=on_step)
        kept |= {row.name: statistics.fmean(min(100.0, value) for value in row.psnr) for row in made.rows}
        write_json(path, kept)
    return {setting.key: kept[name] for name, setting in wanted.items() if name in kept}


def _name(setting: Setting, conditions: str) -> str:
    name, ratio, levels = setting.key
    return f"{name}; ratio {ratio or '-'}; levels {levels}; {conditions}"


def _can_generate(setting: Setting) -> bool:
    if setting == UNTOUCHED or setting.switches.keys() & {"ideal", "tower"}:
        return False
    if setting.switches.get("merge", {}).get("gate", "off") != "off":
        return False  # the gate would decide by times on the embedded pipeline, not on the measured UNet
    try:
        setting.check()
    except EvaluationError:
        return False
    return True
