"""What all commands share: consoles, the JSON switch, progress bars, and errors as a user sees them."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Generator
from typing import Annotated, Any, ParamSpec, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from microscale.errors import MicroscaleError

P = ParamSpec("P")
R = TypeVar("R")

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else on standard output.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of everything random.")]


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output; NaN and Inf become null, as strict JSON wants."""
    sys.stdout.write(json.dumps(_strict(value), ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


def _strict(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Turn our errors into a message on standard error (and a JSON object with --json) and exit code 1."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        seed = kwargs.get("seed")
        if isinstance(seed, int):
            torch.manual_seed(seed)
        try:
            return function(*args, **kwargs)
        except MicroscaleError as error:
            if kwargs.get("as_json"):
                print_json({"error": {"class": type(error).__name__, "message": str(error)}})
            error_console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            error_console.print("interrupted; nothing half-written was left")
            raise typer.Exit(130) from None

    return wrapped


@contextlib.contextmanager
def progress_bar(title: str) -> Generator[Callable[[int, int, str], None], None, None]:
    """Show a bar with the time left on standard error; yields a function of (done, total, label)."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[label]}", style="dim"),
    )
    with Progress(*columns, console=error_console, transient=True) as progress:
        task = progress.add_task(title, total=None, label="")

        def advance(done: int, total: int, label: str) -> None:
            progress.update(task, completed=done, total=total, label=label)

        yield advance
