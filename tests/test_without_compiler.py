"""A machine without a C++ compiler: the install succeeds, the reference path runs, and the user is told so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import microscale

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "models" / "llama-6m"
NOTE = "note: the compiled CPU kernels are not installed"

# Lets a folder on PYTHONPATH win over an editable install, which looks things up before the path does.
NO_EDITABLE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
"""
HIDDEN_EXTENSION = """
import sys
sys.modules["microscale.kernels.cpu._native"] = None
from microscale.cli import main
main()
"""


def check_is_told(outcome: subprocess.CompletedProcess[str]) -> None:
    """The note is one line on standard error with the reason and the remedy."""
    assert outcome.returncode == 0, outcome.stderr
    notes = [line for line in outcome.stderr.splitlines() if line.startswith(NOTE)]
    assert len(notes) == 1, outcome.stderr
    assert "slow reference path" in notes[0] and "install a C++20 compiler" in notes[0]


def test_the_command_line_says_that_the_kernels_are_missing(tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", HIDDEN_EXTENSION, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    version = run("--version")
    check_is_told(version)
    assert version.stdout.startswith(f"microscale {microscale.__version__} (CPU kernels: none")
    quantized = run("quantize", MODEL, "-f", "mxfp4", "-o", tmp_path / "out", "--json")
    check_is_told(quantized)
    json.loads(quantized.stdout)
    generated = run("generate", tmp_path / "out", "The", "-n", "2", "--json")
    check_is_told(generated)
    assert json.loads(generated.stdout)["tokens"] == 2


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A folder for PATH that has the build tools of requirements.txt and no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cmake", "ninja"):
        beside = Path(sys.executable).parent / tool
        found = str(beside) if beside.exists() else shutil.which(tool)
        if found is None:
            pytest.skip(f"no {tool} on this machine")
        target = folder / tool
        target.write_text(f'#!/bin/sh\nexec "{Path(found).absolute()}" "$@"\n')
        target.chmod(0o755)
    shell = shutil.which("sh")
    assert shell is not None
    (folder / "sh").symlink_to(shell)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["no compiler", "not wanted"])
def test_the_install_succeeds_without_a_compiler(tmp_path: Path, bare_path: Path, reason: str) -> None:
    site = tmp_path / "site"
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    if reason == "no compiler":
        environment["PATH"] = str(bare_path)
    else:
        environment["MICROSCALE_NO_KERNELS"] = "1"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--target", str(site), f"--config-settings=build-dir={tmp_path / 'build'}", str(ROOT)]
    installed = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert installed.returncode == 0, installed.stderr
    assert not list((site / "microscale" / "kernels" / "cpu").glob("_native*"))
    assert (site / "microscale" / "report" / "templates" / "comparison.html.j2").exists()
    (site / "sitecustomize.py").write_text(NO_EDITABLE)
    environment["PYTHONPATH"] = str(site)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "microscale", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)

    check_is_told(run("--version"))
    check_is_told(run("quantize", MODEL, "-f", "mxfp4_plus", "-o", tmp_path / "out"))
    check_is_told(run("generate", tmp_path / "out", "The", "-n", "2"))
