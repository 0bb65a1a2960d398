"""What all commands share: consoles, the JSON switch, progress bars, and errors as a user sees them."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from microscale.cli.interrupts import GOES_ON, STARTS_ANEW, exit_status
from microscale.cli.progress import ProgressLines
from microscale.errors import MicroscaleError, OptionError, QuantizationNote
from microscale.jobs.printing import json_text

P = ParamSpec("P")
R = TypeVar("R")

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else on standard output.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of everything random.")]


def print_json(value: Any) -> None:
    """Print a result or a value as JSON on standard output; NaN and Inf become null, as strict JSON wants."""
    sys.stdout.write(json_text(value) + "\n")
    sys.stdout.flush()


def tell_notes() -> None:
    """Print what the package warns of as notes on standard error, without the place in the source."""
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, QuantizationNote):
            error_console.print(f"note: {message}", markup=False, soft_wrap=True)
        else:
            others(message, category, *place, **more)

    warnings.showwarning = show


def tell_missing_kernels() -> None:
    """Say on standard error, in a line for each, how to get compiled kernels that this machine could run but lacks."""
    from microscale.kernels import BACKENDS

    for advice in filter(None, (backend.advice() for backend in BACKENDS)):
        error_console.print(f"note: {advice}", style="yellow", markup=False, soft_wrap=True)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Turn our errors into a message on standard error (and a JSON object with --json) and exit code 1.

    Options that do not go together are a usage error as typer shows it, with exit code 2.

    An interrupt says whether the same command goes on where it was: a study does, and a job with ``--offload``.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except OptionError as error:
            raise typer.BadParameter(str(error)) from None
        except MicroscaleError as error:
            if kwargs.get("as_json"):
                print_json({"error": {"class": type(error).__name__, "message": str(error)}})
            error_console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as interrupt:
            keeps = function.__name__ == "study" or kwargs.get("offload") is not None
            error_console.print(GOES_ON if keeps else STARTS_ANEW)
            raise typer.Exit(exit_status(interrupt)) from None

    return wrapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table: ``drop`` says how early it goes where the terminal is narrow (0: never)."""

    title: str
    is_number: bool = False
    drop: int = 0


def print_table(title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print a table without breaking a cell; a narrow terminal gets fewer columns, a file or pipe gets all."""
    kept = list(range(len(columns)))

    def width() -> int:
        cells = (max(len(row[place]) for row in (*rows, [column.title for column in columns])) for place in kept)
        return sum(cells) + 3 * len(kept) + 1

    while console.is_terminal and width() > console.width and any(columns[place].drop for place in kept):
        kept.remove(max(kept, key=lambda place: columns[place].drop))
    table = Table(title=Text(title), title_justify="left")
    for place in kept:
        justify = "right" if columns[place].is_number else "left"
        table.add_column(Text(columns[place].title), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(row[place]) for place in kept))
    Console(width=max(width(), len(title)), highlight=False, file=console.file).print(table)
    if len(kept) < len(columns):
        hidden = ", ".join(column.title for place, column in enumerate(columns) if place not in kept)
        console.print(f"(a wider terminal also shows: {hidden})", style="dim")


LONGEST_NAME = 20
"""Up to how many characters the names of rows are never broken."""


def print_wrapped_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose long cells are broken into lines where the terminal is narrow; nothing of them is lost.

    A short first cell names its row and stays in one line. A file or a pipe gets every cell in one line.
    """
    widths = [max(len(row[place]) for row in (*rows, columns)) for place in range(len(columns))]
    borders = 3 * len(columns) + 1
    if console.is_terminal:
        name = max(len(row[0]) for row in rows)
        kept = [name] if name <= LONGEST_NAME else []
        room = max(console.width - borders - sum(kept), 8 * (len(columns) - len(kept)))
        widths = [*kept, *shared_widths(widths[len(kept) :], room)]
    table = Table()
    for title, width in zip(columns, widths, strict=True):
        table.add_column(Text(broken(title, width)), no_wrap=True)
    for row in rows:
        table.add_row(*(Text(broken(cell, width)) for cell, width in zip(row, widths, strict=True)))
    Console(width=sum(widths) + borders, highlight=False, file=console.file).print(table)


def shared_widths(widths: Sequence[int], room: int) -> list[int]:
    """Return widths that fit into the room together: the largest are cut to one common width."""
    limit = max(widths)
    while limit > 1 and sum(min(width, limit) for width in widths) > room:
        limit -= 1
    return [min(width, limit) for width in widths]


def broken(text: str, width: int) -> str:
    """Return a text in lines of at most a width: broken at spaces, after ``+`` and ``,``, and in words that are longer.

    Only spaces at the end of a line are left out.
    """
    lines, line = list[str](), ""
    for piece in re.findall(r"[^ +,]*[ +,]|[^ +,]+", text):
        if line and len(line) + len(piece.rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece
        while len(line.rstrip()) > width:
            lines.append(line[:width])
            line = line[width:]
    return "\n".join([*lines, line.rstrip()])


@contextlib.contextmanager
def progress_bar(title: str) -> Generator[Callable[[int, int, str], None], None, None]:
    """Show a bar with the time left on standard error, plain lines where that is no terminal.

    Yields a function of (done, total, label).
    """
    if not error_console.is_terminal:
        yield ProgressLines(title, lambda line: error_console.print(line, markup=False, soft_wrap=True))
        return
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
