"""The limits of the machine: reading and writing memory, and multiply-adds, by loops that do nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.cpu.results import Figure
from benchmarks.cpu.timing import take_turns

from microscale.kernels.cpu.native import NATIVE, level, num_threads

BUFFER_BYTES = 1 << 30
ROUNDS_OF_FMA = 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes and operations per second, in the median."""

    read: float
    fill: float
    fill_past_caches: float
    flops: float

    @property
    def write(self) -> float:
        """The faster of both ways to write."""
        return max(self.fill, self.fill_past_caches)


class LimitLoops:
    """The loops over a buffer that no cache holds."""

    def __init__(self, num_bytes: int = BUFFER_BYTES) -> None:
        assert NATIVE is not None
        self.native: Any = NATIVE
        self.buffer = torch.ones(num_bytes + 64, dtype=torch.uint8)
        self.address = (self.buffer.data_ptr() + 63) & ~63
        self.num_bytes = num_bytes

    def read(self) -> None:
        """Read all of the buffer once, each thread its own stretch."""
        self.native.read_bytes(level(), self.address, self.num_bytes, num_threads())

    def fill(self) -> None:
        """Write the buffer with ordinary stores: lines are read before they are written."""
        self.native.fill_bytes(level(), self.address, self.num_bytes, num_threads(), False)

    def fill_past_caches(self) -> None:
        """Write the buffer with non-temporal stores."""
        self.native.fill_bytes(level(), self.address, self.num_bytes, num_threads(), True)

    def multiply_add(self) -> int:
        """Return the floating-point operations that were executed."""
        return self.native.multiply_add(level(), ROUNDS_OF_FMA, num_threads())

    def cases(self) -> dict[str, Callable[[], object]]:
        """Return all of them by name."""
        return {
            "read": self.read,
            "fill": self.fill,
            "fill past the caches": self.fill_past_caches,
            "multiply-add": self.multiply_add,
        }


def measure_limits(loops: LimitLoops, rounds: int) -> tuple[Limits, list[Figure]]:
    """Measure all limits in turns."""
    times = take_turns(loops.cases(), rounds)
    flops = loops.multiply_add()
    figures = [
        Figure(case=name, unit="GB/s", **times[name].rate(loops.num_bytes / 1e9))
        for name in ("read", "fill", "fill past the caches")
    ]
    figures.append(Figure(case="multiply-add", unit="GFLOP/s", **times["multiply-add"].rate(flops / 1e9)))
    read, fill, streamed, fma = (figure.median * 1e9 for figure in figures)
    return Limits(read=read, fill=fill, fill_past_caches=streamed, flops=fma), figures


def spread(values: list[float]) -> float:
    """Return (largest - smallest) / median: how far the limits moved during a run."""
    return (max(values) - min(values)) / statistics.median(values)
