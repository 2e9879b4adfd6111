"""``python -m gradio_app``: the same as ``tomesd-plus app``, with the same options."""

import sys
from pathlib import Path

if not __package__:  # run as a file, as a Space does
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import Annotated

import typer

from gradio_app.start import start
from tomesd_plus.evaluation.errors import EvaluationError, ModelError
from tomesd_plus.evaluation.names import TINY


def main(
    model: str = TINY,
    device: str | None = None,
    dtype: str | None = None,
    host: str | None = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535)] = None,
    scheduler: str | None = None,
    preset: list[Path] | None = None,
) -> None:
    """Open the comparison app: type a prompt, move the ratio, look at both pictures."""
    try:
        start(model, device, dtype, host, port, scheduler, preset or ())
    except (EvaluationError, ModelError) as error:
        print(f"gradio_app: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
