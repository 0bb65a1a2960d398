"""`import microscale` stays lean: it loads no optional or slow library and opens no CUDA context."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("triton", "transformers", "vllm", "lm_eval", "matplotlib", "rich", "typer", "pydantic")

PROBE = """
import json, sys
{statement}
import torch
print(json.dumps({{"modules": sorted(sys.modules), "cuda": torch.cuda.is_initialized()}}))
"""


def run_probe(statement: str) -> tuple[set[str], bool]:
    """Run the statement in a fresh interpreter; return the top-level packages loaded and whether CUDA was opened."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(statement=statement)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    return {name.partition(".")[0] for name in seen["modules"]}, seen["cuda"]


def test_import_microscale_is_lean() -> None:
    loaded, cuda_is_initialized = run_probe("import microscale")
    assert "microscale" in loaded
    assert not loaded & set(HEAVY)
    assert not cuda_is_initialized


@pytest.mark.parametrize(
    "arguments", [["--help"], ["quantize", "--help"], ["study", "-h"], ["formats"], ["formats", "mxfp4_plus", "--json"]]
)
def test_help_and_formats_import_no_torch(arguments: list[str]) -> None:
    """Both are shown at once: no command imports its job before it runs, and a format is a record of plain numbers."""
    statement = (
        f"import sys\nsys.argv = ['microscale', *{arguments!r}]\nfrom microscale.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    loaded, _ = run_probe(statement)
    assert "typer" in loaded


@pytest.mark.parametrize("heavy", ["rich", "pydantic"])
def test_probe_notices_a_heavy_import(heavy: str) -> None:
    loaded, _ = run_probe(f"import {heavy}")
    assert heavy in loaded
