"""Run `microscale` inside the test process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import typer.testing

from microscale.cli.app import app

RUNNER = typer.testing.CliRunner()


@dataclass(frozen=True)
class Outcome:
    """Exit code and both streams of one command."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one JSON value on standard output, strictly read."""
        return json.loads(self.stdout, parse_constant=refuse_constant)


def refuse_constant(word: str) -> None:
    """NaN and Infinity are no JSON."""
    raise AssertionError(f"standard output holds {word}, which is no JSON")


def microscale_command(*arguments: Any) -> Outcome:
    """Run a command; an exception that is no exit is raised here."""
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(code=result.exit_code, stdout=result.stdout, stderr=result.stderr)


def succeed(*arguments: Any) -> Outcome:
    """Run a command that must succeed."""
    outcome = microscale_command(*arguments)
    assert outcome.code == 0, outcome.stderr
    return outcome


def fail(*arguments: Any) -> str:
    """Run a command that must end with exit code 1; returns its message."""
    outcome = microscale_command(*arguments)
    assert outcome.code == 1, outcome.stdout + outcome.stderr
    assert outcome.stderr.strip().startswith("error: "), outcome.stderr
    assert "Traceback" not in outcome.stderr
    return outcome.stderr.strip()
