"""Growth of the resident memory while a packed checkpoint of 0.3 billion parameters is loaded, beside its size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.cpu.models import HERE, SHAPE
from benchmarks.cpu.results import CONSOLE, Figure
from transformers import LlamaConfig, LlamaForCausalLM

import microscale

GOAL = 1.15


def write_checkpoint(work_dir: Path, fmt: str, layout: str) -> Path:
    """Write a random Llama in a format and a file layout, unless it is there."""
    path = work_dir / f"checkpoint-{fmt}-{layout}-{SHAPE['hidden']}x{SHAPE['layers']}"
    if (path / "config.json").exists():
        return path
    shutil.rmtree(path, ignore_errors=True)
    config = LlamaConfig(
        hidden_size=SHAPE["hidden"],
        intermediate_size=SHAPE["ffn"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        vocab_size=SHAPE["vocab"],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    microscale.save(microscale.quantize(model, fmt), path, layout=layout, overwrite=True)
    return path


def measure_memory(
    work_dir: Path, cases: Sequence[tuple[str, str]], ways: Sequence[str]
) -> tuple[list[Figure], dict[str, Any]]:
    """Load every checkpoint in every way, each in a process of its own."""
    figures: list[Figure] = []
    failures: list[str] = []
    for fmt, layout in cases:
        path = write_checkpoint(work_dir, fmt, layout)
        for way in ways:
            command = [sys.executable, str(HERE / "load_memory.py"), str(path), way]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                failures.append(f"{fmt}, {layout}, {way}: {done.stderr.strip()[-300:]}")
                continue
            answer = json.loads(done.stdout.splitlines()[-1])
            for kind in ("peak", "final"):
                growth = answer[f"{kind}_growth_bytes"]
                figures.append(
                    Figure(
                        case=f"{fmt}, layout {layout}, {way}: {kind} growth",
                        unit="MB",
                        median=growth / 1e6,
                        compared_to="file size",
                        ratio=growth / answer["file_bytes"],
                        goal=GOAL,
                        goal_is_at_most=True,
                        facts=answer,
                    )
                )
            CONSOLE.print(f"  memory {fmt} {layout} {way}", style="dim")
    return figures, {"failures": failures}
