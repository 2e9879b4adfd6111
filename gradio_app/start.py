"""Start the app: load a model, and serve the page until it is stopped."""

from collections.abc import Sequence
from pathlib import Path

from tomesd_plus.evaluation.errors import EvaluationError
from tomesd_plus.evaluation.names import TINY


def start(
    model: str = TINY,
    device: str | None = None,
    dtype: str | None = None,
    host: str | None = None,
    port: int | None = None,
    scheduler: str | None = None,
    presets: Sequence[Path] = (),
) -> None:
    """Open the comparison app: type a prompt, move the ratio, look at both pictures.

    Args:
        model: ``"tiny"`` for the embedded pipeline, a hub id, a folder, or a checkpoint file.
        device: As PyTorch names it; the best available by default.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; by default float16 on a GPU, else float32.
        host: Address to listen on; 127.0.0.1 by default.
        port: By default the first free one from 7860.
        scheduler: In place of the model's own, by name.
        presets: Files of presets to offer beside those by name.

    Raises:
        EvaluationError: There is no gradio, or device, dtype or address cannot be used, or a file is no preset.
        ModelError: The model or scheduler cannot be loaded.
    """
    from tomesd_plus.evaluation.quiet import quiet_libraries

    quiet_libraries()
    try:
        from gradio_app.ui import build_demo, launch_options
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise EvaluationError("the app needs gradio: pip install 'gradio>=6,<7'") from error
    import torch

    from gradio_app.backend import Backend
    from tomesd_plus.evaluation.generation.devices import dtype_by_name, local_device, usable_device
    from tomesd_plus.evaluation.generation.models import load_model
    from tomesd_plus.presets import preset_from

    device = local_device(device)
    torch_dtype = dtype_by_name(dtype, usable_device(device))
    try:
        offered = {str(path): preset_from(path) for path in presets}
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    pipe = load_model(model, device, torch_dtype, scheduler=scheduler)
    dtype = str(torch_dtype).removeprefix("torch.")
    print(f"{model}: {device}, {dtype}, torch {torch.__version__}")
    demo = build_demo(Backend(pipe, model, dtype, offered))
    try:
        demo.launch(server_name=host, server_port=port, share=False, **launch_options())
    except OSError as error:  # the port is taken, or there is no such address
        raise EvaluationError(
            f"cannot listen on {host or '127.0.0.1'}, port {port or 'from 7860'}: {error}"
        ) from error
