"""quantize and dequantize of every named format, beside the torch reference and the write bandwidth.

One matrix of float32 numbers larger than the caches. quantize counts bytes read, dequantize bytes written; results go
into new memory, as a user gets them, whose pages the system hands out one by one: the loop ``new memory`` shows what
that alone costs. The reference runs on the first rows only and is compared by its rate.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from benchmarks.cpu.limits import LimitLoops
from benchmarks.cpu.results import CONSOLE, Figure
from benchmarks.cpu.timing import take_turns

from microscale.formats import parse_format
from microscale.kernels import dequantize, quantize, reference

GOAL_BYTES_PER_SECOND = 8e9
GOAL_OVER_REFERENCE = 20.0
GOAL_SHARE_OF_WRITE = 0.70
WITH_GOAL = ("mxfp4", "mxfp8_e4m3")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What is measured."""

    formats: Sequence[str]
    rows: int
    cols: int
    reference_rows: int
    rounds: int


def measure_quantize(options: QuantizeOptions, loops: LimitLoops) -> list[Figure]:
    """Measure all formats, one after the other, each in turns with its reference and the loops of the limits."""
    values = torch.randn(options.rows, options.cols, generator=torch.Generator().manual_seed(0))
    figures: list[Figure] = []
    for name in options.formats:
        figures += _figures_of(name, values, options, loops)
        CONSOLE.print(f"  quantize {name}", style="dim")
    return figures


def _figures_of(name: str, values: torch.Tensor, options: QuantizeOptions, loops: LimitLoops) -> list[Figure]:
    fmt = parse_format(name)
    few = values[: options.reference_rows]
    packed, few_packed = quantize(values, fmt), reference.quantize(few, fmt)
    out = torch.empty_like(values).zero_()
    cases: dict[str, Callable[[], object]] = {
        "write": loops.fill_past_caches,
        "write through caches": loops.fill,
        "new memory": lambda: torch.empty_like(values).fill_(1.0),
        "quantize": lambda: quantize(values, fmt),
        "dequantize": lambda: dequantize(packed, torch.float32),
    }
    if "out" in inspect.signature(dequantize).parameters:
        cases["dequantize into given memory"] = lambda: dequantize(packed, torch.float32, out=out)  # pyright: ignore
    times = take_turns(cases, options.rounds)
    slow = take_turns(
        {
            "quantize": lambda: reference.quantize(few, fmt),
            "dequantize": lambda: reference.dequantize(few_packed, torch.float32),
        },
        max(1, options.rounds // 3),
    )
    num_bytes, few_bytes = values.numel() * 4, few.numel() * 4
    write = loops.num_bytes / min(times["write"].median, times["write through caches"].median)
    figures = []
    for case in (case for case in cases if "quantize" in case):
        rate = num_bytes / times[case].median
        slow_rate = few_bytes / slow[case.partition(" ")[0]].median
        facts = {"format": name, "write_gb_per_second": write / 1e9, "reference_gb_per_second": slow_rate / 1e9}
        facts |= {"new_memory_gb_per_second": num_bytes / times["new memory"].median / 1e9}
        facts |= {"seconds": list(times[case].seconds)}
        values_of = {"unit": "GB/s", **times[case].rate(num_bytes / 1e9), "facts": facts}
        title = f"{case} {name}"
        has_goal = case == "quantize" and name in WITH_GOAL
        if case == "quantize":
            goal = 1.0 if has_goal else None
            figures.append(
                Figure(case=title, compared_to="8 GB/s", ratio=rate / GOAL_BYTES_PER_SECOND, goal=goal, **values_of)
            )
            goal = GOAL_OVER_REFERENCE if has_goal else None
            figures.append(Figure(case=title, compared_to="reference", ratio=rate / slow_rate, goal=goal, **values_of))
        else:
            figures.append(
                Figure(case=title, compared_to="write", ratio=rate / write, goal=GOAL_SHARE_OF_WRITE, **values_of)
            )
    return figures
