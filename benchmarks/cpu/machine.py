"""What a reader needs to compare the numbers with others: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import microscale
from microscale.kernels.cpu import native


def machine_facts() -> dict[str, Any]:
    """Return the facts as they are written into every result file."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernel_level": native.level_name(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "microscale": microscale.__version__,
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """Return the processor's name, with its caches, as the system gives them."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
    ]
    caches = [f"L{level} {size}" for level, size in _caches()]
    return ", ".join([names[0] if names else platform.machine(), *caches])


def _caches() -> list[tuple[str, str]]:
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (folder / "type").read_text().strip() != "Instruction":
            found[(folder / "level").read_text().strip()] = (folder / "size").read_text().strip()
    return sorted(found.items())


def git_commit() -> str:
    """Return the commit of the tree, with ``+changes`` where sources were edited, or ``unknown``."""
    commands = (
        ["git", "rev-parse", "--short=12", "HEAD"],
        ["git", "status", "--porcelain", "--", "../../src", "../../csrc"],
    )
    try:
        commit, status = (
            subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if status else commit
