"""From a record of options to a command and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.testing

from microscale.cli.output import JsonOption
from microscale.cli.parameters import job_command
from microscale.jobs.option import Option, Options, Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Options):
    source: Annotated[Any, Option(help="Read this.", word="calibration", command_type=str | None)] = None
    samples: Annotated[int, Option(help="So many.", short="-s", minimum=1)] = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Options):
    model: Annotated[Any, Option(help="The model.", place=Place.ARGUMENT, command_type=str)]
    output: Annotated[Path | None, Option(help="Write there.", place=Place.REQUIRED)] = None
    rules: Annotated[Sequence[str], Option(help="Rules.", flag="--rule")] = ()
    is_loud: Annotated[bool, Option(help="Shout.", flag="--loud")] = False
    listener: Annotated[Any, Option(place=Place.PYTHON)] = None
    text: Text = Text(samples=8)


def run(*arguments: str) -> tuple[typer.testing.Result, list[tuple[Job, bool]]]:
    seen: list[tuple[Job, bool]] = []
    app = typer.Typer()

    @app.command()
    @job_command(Job)
    def job(options: Job, as_json: JsonOption = False) -> None:
        """Do it."""
        seen.append((options, as_json))

    assert job.__name__ == "job"
    return typer.testing.CliRunner().invoke(app, arguments), seen


def test_what_is_typed_fills_the_record() -> None:
    result, seen = run("M", "--output", "out", "--rule", "a=b", "--rule", "c", "-s", "3", "--loud", "--json")
    assert result.exit_code == 0, result.output
    text = Text(source=None, samples=3)
    assert seen == [(Job(model="M", output=Path("out"), rules=("a=b", "c"), is_loud=True, text=text), True)]


def test_what_is_not_typed_has_its_default() -> None:
    result, seen = run("M", "--output", "out")
    assert result.exit_code == 0, result.output
    assert seen == [(Job(model="M", output=Path("out")), False)] and seen[0][0].text.samples == 8


def test_the_help_and_what_it_refuses() -> None:
    shown = " ".join(run("--help")[0].output.split())
    for words in ("Do it.", "--rule", "-s", "x>=1", "default: 8", "Read this.", "--calibration", "--loud", "required"):
        assert words in shown, words
    assert "listener" not in shown and "--no-loud" not in shown
    assert run("M")[0].exit_code == 2 and "--output" in run("M")[0].output
    assert run("M", "--output", "o", "-s", "0")[0].exit_code == 2
