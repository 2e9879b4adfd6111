"""What is answered at once: help, the version and wrong options load nothing that takes long."""

import subprocess
import sys

import pytest

from tomesd_plus.benchmark import SHAPES, SUITES, TOWERS
from tomesd_plus.cli import names
from tomesd_plus.merging.config import LEVELS
from tomesd_plus.presets import PRESETS
from tomesd_plus.vision.methods import METHODS

COMMANDS = ("compare", "generate", "tune", "evaluate", "report", "statistics", "benchmark", "app")
HEAVY = {"torch", "diffusers", "transformers", "matplotlib", "torchmetrics", "numpy", "gradio"}
CODE = """
import runpy, sys
sys.argv[0] = "tomesd-plus"
try:
    runpy.run_module("tomesd_plus", run_name="__main__")
finally:
    print("loaded:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def run(*arguments):
    """The exit code, what is printed, and the modules that were loaded for it."""
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    errors, loaded = done.stderr.split("loaded:")
    return done.returncode, done.stdout + errors, set(loaded.split())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "benchmark"),
        (["--version"], 0, "tomesd-plus 0."),
        ([], 2, "compare"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["--nope"], 2, "No such option"),
        (["generate", "--nope"], 2, "No such option"),
        (["compare", "--steps", "0", "a cat"], 2, "'--steps'"),
        (["generate", "--more-at", "never", "a cat"], 2, "noisy"),
        (["generate", "--ratio", "1.5", "a cat"], 2, "a ratio must be a number in [0, 1), not 1.5"),
        (["generate", "--ratio", "nan", "a cat"], 2, "a ratio must be a number in [0, 1), not nan"),
        (["compare", "--ratio", "0.5", "--ratio", "0.9"], 2, "a ratio of 0.9 is more than the cells allow"),
        (["benchmark", "--ratio", "-0.1"], 2, "a ratio must be a number in [0, 1), not -0.1"),
        (["compare", "--schedule", "sine"], 2, "unknown schedule 'sine'"),
        (["generate", "--max-downsample", "3"], 2, "max_downsample must be one of 1, 2, 4, 8, not 3"),
        (["generate", "--size", "big", "a cat"], 2, "size must be a number of pixels"),
        (["generate", "--dtype", "int8", "a cat"], 2, "unknown dtype 'int8': choose from float32, bfloat16, float16"),
        (["generate", "--model", "my/model"], 2, "give at least one prompt"),
        (["tune", "--speedup", "1"], 2, "a speed-up must be larger than 1, not 1"),
        (["tune", "--speedup", "2", "--psnr", "30"], 2, "either --speedup or --psnr"),
        (["generate", "--preset", "fast", "--ratio", "0.5", "a cat"], 2, "leave out --preset"),
        (["statistics", "pictures", "--out", "reference.csv"], 2, "--out must name an .npz file"),
        (["report", "one", "two"], 2, "several evaluations need --out"),
        (["benchmark", "--suite", "huge"], 2, "unknown suite 'huge': choose from cpu, gpu, vision, smoke"),
        (["benchmark", "--shape", "sd4"], 2, "unknown shape 'sd4': choose from sd15, sd21, sdxl, pixart"),
        *([[command, "--help"], 0, f"tomesd-plus {command} [OPTIONS]"] for command in COMMANDS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_it_is_answered_without_heavy_imports(arguments, code, words):
    exit_code, output, loaded = run(*arguments)
    assert exit_code == code, output
    assert words in output and "Traceback" not in output
    assert "typer" in loaded and not loaded & HEAVY


def test_the_names_in_help_texts_are_the_ones_there_are():
    assert tuple(PRESETS) == names.PRESETS
    assert LEVELS == names.DOWNSAMPLES
    assert tuple(SHAPES) == names.SHAPES
    assert tuple(SUITES) == names.SUITES
    assert tuple(TOWERS) == names.TOWERS
    assert tuple(METHODS) == names.METHODS
