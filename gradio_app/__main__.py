"""``python -m gradio_app``: the same as ``tomesd-plus app``."""

import sys
from pathlib import Path

if not __package__:  # run as a file, as a Space does
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from tomesd_plus.cli.app import app_command

if __name__ == "__main__":
    typer.run(app_command)
