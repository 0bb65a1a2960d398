"""The application of the command line: its commands and global options."""

from __future__ import annotations

from typing import Annotated

import typer

from microscale import __version__
from microscale.cli.allocate_command import allocate
from microscale.cli.analyze_command import analyze
from microscale.cli.bench_command import bench
from microscale.cli.compare_command import compare
from microscale.cli.eval_command import evaluate
from microscale.cli.explain_command import explain
from microscale.cli.formats_command import formats
from microscale.cli.generate_command import generate
from microscale.cli.inspect_command import inspect
from microscale.cli.methods_command import methods
from microscale.cli.output import console, tell_missing_kernels
from microscale.cli.quantize_command import quantize
from microscale.cli.study_command import study
from microscale.cli.tasks_command import tasks

app = typer.Typer(
    name="microscale",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("formats")(formats)
app.command("quantize")(quantize)
app.command("inspect")(inspect)
app.command("explain")(explain)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("compare")(compare)
app.command("bench")(bench)
app.command("tasks")(tasks)
app.command("methods")(methods)
app.command("study")(study)
app.command("analyze")(analyze)
app.command("allocate")(allocate)


def _show_version(value: bool) -> None:
    if value:
        from microscale.kernels import BACKENDS

        missing = "none, the slow reference path is in use"
        compiled = [
            f"{backend.title}: {missing if backend.unavailable() else backend.level()}"
            for backend in BACKENDS
            if backend.level() is not None
        ]
        console.print(f"microscale {__version__} ({', '.join(compiled)})")
        tell_missing_kernels()
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and which CPU kernels run.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Language models in microscaling (MX) formats: quantize, compare, inspect, score, generate.

    Start with: `microscale quantize MODEL --format mxfp4 -o OUT`
    """
