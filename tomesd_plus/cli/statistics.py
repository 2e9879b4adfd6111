"""``tomesd-plus statistics``: the reference's features, extracted once for many evaluations."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from tomesd_plus.cli.common import check_writable, console, fail, progress_bar, quiet, run, usable
from tomesd_plus.cli.options import Device
from tomesd_plus.evaluation.names import INCEPTION


def statistics_command(
    pictures: Annotated[str, typer.Argument(help="A folder of images, or a data set's id.")],
    out: Annotated[Path, typer.Option(help="The .npz file to write.")] = Path("reference.npz"),
    features: Annotated[str, typer.Option(help="inception, tiny (embedded), or a CLIP's id or folder.")] = INCEPTION,
    inception_weights: Annotated[str | None, typer.Option(help="A file. Default: downloaded.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "validation",
    column: Annotated[str | None, typer.Option(help="Its column. Default: image …")] = None,
    device: Device = None,
) -> None:
    """Save the statistics of reference images that `evaluate --reference` needs; pytorch-fid reads the file too."""
    if out.suffix != ".npz":
        fail(f"--out must name an .npz file, not {str(out)!r}")
    check_writable(out.parent)
    quiet()
    from tomesd_plus.evaluation.scoring.extractors import load_extractor
    from tomesd_plus.evaluation.scoring.reference import save_reference
    from tomesd_plus.evaluation.words import in_words, printable

    where = usable(device)
    extractor = run(lambda: load_extractor(features, where, inception_weights))
    with progress_bar("pictures") as progress:
        bar = progress.add_task(extractor.name, total=None)
        reference = run(
            lambda: save_reference(pictures, extractor, out, split, column, lambda count: progress.advance(bar, count))
        )
    skipped = f"; left out: {in_words(reference.skipped)}" if reference.skipped else ""
    line = f"Written: {printable(out)}, {reference.statistics.count} pictures by {extractor.name}{skipped}"
    console.print(escape(line), soft_wrap=True)
