"""The ``tomesd-plus`` command: a file a subcommand."""

from typing import Annotated

import typer

from tomesd_plus.cli.app import app_command
from tomesd_plus.cli.benchmark import benchmark_command
from tomesd_plus.cli.common import console
from tomesd_plus.cli.compare import compare_command
from tomesd_plus.cli.evaluate import evaluate_command
from tomesd_plus.cli.generate import generate_command
from tomesd_plus.cli.report import report_command
from tomesd_plus.cli.statistics import statistics_command
from tomesd_plus.cli.tune import tune_command
from tomesd_plus.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("compare")(compare_command)
app.command("generate")(generate_command)
app.command("tune")(tune_command)
app.command("evaluate")(evaluate_command)
app.command("report")(report_command)
app.command("statistics")(statistics_command)
app.command("benchmark")(benchmark_command)
app.command("app")(app_command)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Faster Stable Diffusion by merging redundant tokens."""
    if version:
        console.print(f"tomesd-plus {__version__}")
        raise typer.Exit()
