"""``tomesd-plus app``: both pictures side by side, in a browser."""

from typing import Annotated

import typer

from tomesd_plus.cli.common import console, fail, load
from tomesd_plus.cli.options import Device, Dtype, Model
from tomesd_plus.evaluation.names import TINY


def app_command(
    model: Model = TINY,
    device: Device = None,
    dtype: Dtype = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0: all. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default: the first free one from 7860.")] = None,
) -> None:
    """Open the comparison app: type a prompt, move the ratio, look at both pictures."""
    try:
        from gradio_app.ui import build_demo, launch_options
    except ModuleNotFoundError as error:
        if error.name not in ("gradio", "gradio_app"):
            raise
        fail("the app needs gradio: pip install 'tomesd-plus[app]'")
    from gradio_app.backend import Backend

    pipe, where = load(model, device, dtype)
    dtype_name = str(pipe.unet.dtype).removeprefix("torch.")
    console.print(f"{model}: {where}", soft_wrap=True)
    demo = build_demo(Backend(pipe, model, dtype_name))
    try:
        demo.launch(server_name=host, server_port=port, **launch_options())
    except OSError as error:  # the port is taken, or there is no such address
        fail(f"cannot listen on {host or '127.0.0.1'}, port {port or 'from 7860'}: {error}")
