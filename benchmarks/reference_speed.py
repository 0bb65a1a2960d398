"""Measure quantize and dequantize of the reference backend for each named format.

    python benchmarks/reference_speed.py [--size 4096] [--repeats 5] [--formats mxfp4 nvfp4 …] [--json PATH]

A square bfloat16 weight of normal numbers is quantized and dequantized on the CPU. Reported is the median over the
repeats, after one run that is not counted. The JSON file holds every time with the facts of the machine. Nothing
here is a test: speed is never asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from microscale.formats import NAMED_FORMATS, parse_format
from microscale.kernels.reference import dequantize, quantize

DEFAULT_JSON = Path(__file__).resolve().parent / "results" / "reference_speed.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One format: bytes of the packed weight, and the seconds of each repeat."""

    format: str
    num_bytes: int
    quantize_seconds: list[float]
    dequantize_seconds: list[float]
    quantize_values_per_second: float
    dequantize_values_per_second: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the JSON file."""
    options = parse_arguments(arguments)
    weight = torch.randn(options.size, options.size, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    print(f"{options.size}x{options.size} bfloat16, {torch.get_num_threads()} threads, median of {options.repeats}")
    print(HEADER)
    measurements: list[Measurement] = []
    for name in options.formats:
        measurements.append(measure(name, weight, options.repeats))
        print(table_line(measurements[-1], weight.numel()), flush=True)
    result = {
        "machine": machine_facts(),
        "shape": list(weight.shape),
        "dtype": "bfloat16",
        "repeats": options.repeats,
        "measurements": [asdict(measurement) for measurement in measurements],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.json}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; formats are checked before anything is measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each operation")
    parser.add_argument("--formats", nargs="+", default=list(NAMED_FORMATS), help="names or specs")
    parser.add_argument("--json", type=Path, default=DEFAULT_JSON, help="file to write")
    options = parser.parse_args(arguments)
    if options.size < 1 or options.repeats < 1:
        parser.error("--size and --repeats must be at least 1")
    for name in options.formats:
        try:
            parse_format(name)
        except ValueError as error:
            parser.error(str(error))
    return options


def measure(name: str, weight: torch.Tensor, repeats: int) -> Measurement:
    """Time both operations for one format."""
    record = parse_format(name)
    packed = quantize(weight, record)
    quantize_seconds = time_runs(lambda: quantize(weight, record), repeats)
    dequantize_seconds = time_runs(lambda: dequantize(packed), repeats)
    return Measurement(
        format=name,
        num_bytes=packed.num_bytes,
        quantize_seconds=quantize_seconds,
        dequantize_seconds=dequantize_seconds,
        quantize_values_per_second=weight.numel() / statistics.median(quantize_seconds),
        dequantize_values_per_second=weight.numel() / statistics.median(dequantize_seconds),
    )


def time_runs(run: Callable[[], object], repeats: int) -> list[float]:
    """Return the wall-clock seconds of each run, after one that is not counted."""
    run()
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


HEADER = f"{'format':<18} {'MiB':>7} {'bits/value':>10} {'quantize Mvalues/s':>19} {'dequantize Mvalues/s':>21}"


def table_line(measurement: Measurement, numel: int) -> str:
    """Return one line of the printed table."""
    return (
        f"{measurement.format:<18} {measurement.num_bytes / 2**20:>7.2f} {measurement.num_bytes * 8 / numel:>10.3f}"
        f" {measurement.quantize_values_per_second / 1e6:>19.1f}"
        f" {measurement.dequantize_values_per_second / 1e6:>21.1f}"
    )


def machine_facts() -> dict[str, Any]:
    """Return what a reader needs to compare the numbers with others."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """Return the processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """Return the commit of the tree, with ``+changes`` where it was edited, or ``unknown``."""
    commands = (["git", "rev-parse", "--short=12", "HEAD"], ["git", "status", "--porcelain", "--", "src"])
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


if __name__ == "__main__":
    sys.exit(main())
