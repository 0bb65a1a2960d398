"""SIGTERM ends a command as Ctrl-C does: a line on standard error, the shell's exit status, and nothing lost."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import succeed
from small_models import save_random_model

SENDS = """
import os, signal, sys
from {module} import {owner}

signal.signal(signal.SIGINT, signal.default_int_handler)  # what shells start in the background has it ignored
real = {owner}.{name}

def sending(*arguments, **options):
    result = real(*arguments, **options)
    os.kill(os.getpid(), signal.{word})
    return result

{owner}.{name} = sending
from microscale.cli import main
sys.argv = ["microscale", *sys.argv[1:]]
main()
"""
"""Runs the command line and gets a signal right after the first call of a method."""

LAYER = ("microscale.recipes.calibrated", "Quantizer", "_finish")
SCORE = ("microscale.jobs.study_executor", "QuantizeAndScore", "score")
CASES = [("SIGTERM", 143), ("SIGINT", 130)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "tiny")


def interrupted(place: tuple[str, str, str], word: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command that gets a signal in the middle of its work."""
    module, owner, name = place
    script = SENDS.format(module=module, owner=owner, name=name, word=word)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".safetensors"}


@pytest.mark.parametrize(("word", "status"), CASES)
def test_a_job_goes_on_after_a_signal(model: Path, tmp_path: Path, word: str, status: int) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The harbour was quiet. " * 40)
    job = ["quantize", model, "-f", "mxfp4", "--method", "gptq", "--calibration", text, "--samples", 2, "--window", 32]
    kept = [*job, "--offload", tmp_path / "job", "-o", tmp_path / "out"]
    outcome = interrupted(LAYER, word, *kept)
    assert (outcome.returncode, outcome.stdout) == (status, "")
    assert outcome.stderr.strip().splitlines()[-1] == "interrupted; run again to go on"
    assert "Traceback" not in outcome.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["job", "text.txt"]
    (state,) = (tmp_path / "job").iterdir()
    assert any(state.iterdir())
    succeed(*kept)
    succeed(*job, "-o", tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole") != {}


def test_without_a_place_to_keep_a_job_nothing_is_left(model: Path, tmp_path: Path) -> None:
    outcome = interrupted(
        LAYER, "SIGTERM", "quantize", model, "-f", "mxfp4", "--method", "hadamard", "-o", tmp_path / "o"
    )
    assert (outcome.returncode, outcome.stderr.strip()) == (143, "interrupted; nothing half-written was left")
    assert list(tmp_path.iterdir()) == []


def test_a_study_goes_on_after_a_signal(model: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("The harbour was quiet. " * 20)
    file = tmp_path / "small.yaml"
    file.write_text(f"models: [{model}]\nformats: [mxfp8]\ntasks: [{{text: book.txt, window: 32}}]\n")
    outcome = interrupted(SCORE, "SIGTERM", "study", file)
    assert (outcome.returncode, outcome.stderr.strip()) == (143, "interrupted; run again to go on")
    assert not (tmp_path / "small.html").exists()
    with sqlite3.connect(tmp_path / "small.sqlite") as results:
        assert {row[0] for row in results.execute("SELECT state FROM runs")} == {"waiting"}
    assert [row["state"] for row in json.loads(succeed("study", file, "--json").stdout)] == ["done", "done"]


def test_a_second_signal_ends_the_process_at_once() -> None:
    script = """
import os, signal
from microscale.cli.interrupts import catch_termination
catch_termination()
try:
    os.kill(os.getpid(), signal.SIGTERM)
except KeyboardInterrupt:
    os.kill(os.getpid(), signal.SIGTERM)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGTERM
