"""Our own modules run with ``-W error``: nothing in them is deprecated, unclosed or doubtful.

While the tests run, `pyproject.toml` makes an error of each warning in our modules; here a fresh interpreter imports
all of them and goes the main ways, since what is imported before the tests begin is not watched.
"""

import subprocess
import sys
from pathlib import Path

import pytest

EVERY_MODULE = """
import importlib, pkgutil, warnings
warnings.filterwarnings("error", module=r"(tomesd_plus|gradio_app)")
import tomesd_plus
roots = ["tomesd_plus"]
if importlib.util.find_spec("gradio"):
    import gradio_app
    roots.append("gradio_app")
paths = {root: importlib.import_module(root).__path__ for root in roots}
names = [name for root in roots for _, name, _ in pkgutil.walk_packages(paths[root], f"{root}.")]
names = [name for name in names if ".integrations." not in name]  # they need what make test-pruna installs
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
for name in tomesd_plus.__all__:
    getattr(tomesd_plus, name)
print("imported", len(names))
"""

MAIN_WAYS = """
import sys, warnings
warnings.filterwarnings("error", module=r"(tomesd_plus|gradio_app)")
from typer.testing import CliRunner
from tomesd_plus import *
from tomesd_plus.cli import app
from tomesd_plus import tomesd
pipe = load_tiny_pipeline()
pipe.set_progress_bar_config(disable=True)
def picture():
    return pipe("a large star on a blue background", num_inference_steps=3).images[0]
with token_merging(pipe, ratio=0.5, full_steps=2, proportional_attention=True) as report:
    picture()
    str(report)
with feature_cache(pipe, interval=2) as report:
    picture()
    str(report)
with preset(pipe, "fast", force=True) as report:
    picture()
    str(report)
tomesd.apply_patch(pipe, ratio=0.5)
picture()
tomesd.remove_patch(pipe)
pipe.unet.set_attn_processor(ToMeProcessor(ratio=0.5))
picture()
remove_token_merging(pipe)
out = sys.argv[1]
arguments = "evaluate --limit 2 --steps 2 --timed-runs 1 --resamples 5 --no-lpips --device cpu --out".split()
for call in ([*arguments, out], ["report", out], ["compare", "--steps", "2", "--out", out + "/compare.png"]):
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, (call, result.output, result.exception)
print("done")
"""


@pytest.mark.parametrize(
    ("script", "last"), [(EVERY_MODULE, "imported"), pytest.param(MAIN_WAYS, "done", marks=pytest.mark.slow)]
)
def test_a_fresh_interpreter_with_warnings_as_errors(script, last, tmp_path):
    root = Path(__file__).parent.parent
    # -W default: the interpreter hides warnings of deprecation by itself; ours are errors
    command = [sys.executable, "-W", "default", "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert last in done.stdout
    ours = [
        line
        for line in done.stderr.splitlines()
        if "Warning" in line and ("/tomesd_plus/" in line or "/gradio_app/" in line)
    ]
    assert not ours, ours
