"""``tomesd-plus app``: both images side by side, in a browser."""

from pathlib import Path
from typing import Annotated

import typer

from tomesd_plus.cli.common import fail
from tomesd_plus.cli.options import Device, Dtype, Model, Scheduler
from tomesd_plus.evaluation.errors import EvaluationError, ModelError
from tomesd_plus.evaluation.names import TINY


def app_command(
    model: Model = TINY,
    device: Device = None,
    dtype: Dtype = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0: all. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default: the first free one from 7860.")] = None,
    scheduler: Scheduler = None,
    preset: Annotated[list[Path] | None, typer.Option(help="A preset's file to offer; repeatable.")] = None,
) -> None:
    """Open the comparison app: type a prompt, move the ratio, look at both images."""
    from gradio_app.start import start

    try:
        start(model, device, dtype, host, port, scheduler, preset or ())
    except (EvaluationError, ModelError) as error:
        fail(str(error))
