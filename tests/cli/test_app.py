"""What all commands share: help with an example, the version, clean streams and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import microscale
from command_line import microscale_command, succeed
from microscale.cli.app import app
from microscale.kernels.cpu import native
from small_models import REPO_ROOT, save_random_model

COMMANDS = [str(command.name) for command in app.registered_commands]
SEEDLESS = ("explain", "tasks", "study")
"""Commands that draw nothing, or whose file names the seed."""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_every_command_shows_an_example(command: str, flag: str) -> None:
    answer = " ".join(succeed(command, flag).stdout.split())
    assert f"microscale {command}" in answer
    assert "Example" in answer
    assert "--json" in answer and ("--seed" in answer) == (command not in SEEDLESS)


def test_the_general_help_lists_every_command() -> None:
    answer = succeed("--help").stdout
    for command in COMMANDS:
        assert command in answer
    assert "microscale quantize MODEL --format mxfp4 -o OUT" in " ".join(answer.split())
    assert microscale_command().code == 2  # without arguments: the same text, but nothing was asked for
    level = native.level_name() if native.UNAVAILABLE is None else "none, the slow reference path is in use"
    assert succeed("--version").stdout.strip() == f"microscale {microscale.__version__} (CPU kernels: {level})"


def test_an_unknown_command_is_a_usage_error() -> None:
    outcome = microscale_command("quantise")
    assert outcome.code == 2 and outcome.stdout == "" and "quantise" in outcome.stderr


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    variables = {**os.environ, "PYTHONPATH": str(REPO_ROOT / "src"), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "microscale", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300, check=False)


def test_a_process_prints_one_json_value_and_nothing_else(tmp_path: Path) -> None:
    """With colours forced and warnings on: no bar, no warning, no escape code on standard output."""
    source = save_random_model(tmp_path / "model")
    result = run(
        *("quantize", source, "-f", "mxfp4", "-o", tmp_path / "out", "--json"), FORCE_COLOR="1", PYTHONWARNINGS="always"
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["layers"] == 14
    assert "\x1b" not in result.stdout


def test_a_process_fails_with_a_message_and_no_traceback(tmp_path: Path) -> None:
    result = run("quantize", tmp_path / "a" / "b", "-f", "mxfp4", "-o", tmp_path / "out")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "is not a model directory" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
