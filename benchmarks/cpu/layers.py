"""Linear layers: decode with few rows over weights that no cache holds, prefill with many rows.

Decode: of every layer there are so many copies that a round through them reads ``POOL_BYTES``, more than the caches
hold; a run is one call on each copy, one after the other. In turns with it the same bytes, copy by copy, go through
the loop that only reads, so that the share of the read bandwidth compares like with like. torch's layers get pools of
the same kind. Prefill: one weight, in turns with torch's float32 and bfloat16 layers of the same shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.cpu.linear_calls import Prepared, copy_weight, prepare, random_weight
from benchmarks.cpu.results import CONSOLE, Figure
from benchmarks.cpu.timing import Times, take_turns
from torch import Tensor
from torch.nn import functional

from microscale.kernels.cpu.native import NATIVE, level, num_threads

POOL_BYTES = 768 << 20
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
"""[rows, cols] of the weights."""

INT8_BLOCKS = "int8/32:fp32:amax"
FORMATS = (
    "mxfp4",
    "mxfp8_e4m3",
    "mxfp8_e5m2",
    "mxint8",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxint4",
    "mxfp4_plus",
    "mxfp4_plusplus",
    "mxfp6_plus",
    "mxfp8_plus",
    "mxint8_plus",
    "nvfp4",
    "nvfp4_plus",
    "int4_asym",
    "int3_asym",
    "int2_asym",
    "mxfp4_sparse",
    "adaptive_2_4",
)
SHARE_OF_READ = {"mxfp4": 0.70, "mxfp8_e4m3": 0.85, "mxfp8_e5m2": 0.85, "mxint8": 0.85}
"""Goals of decode with one row and 8-bit blocks; the next holds for MXFP6, MX+ and NVFP4."""
SHARE_OF_READ_OTHERS = 0.65
OTHERS = ("mxfp6_e2m3", "mxfp6_e3m2", "mxfp4_plus", "mxfp6_plus", "mxfp8_plus", "mxint8_plus", "nvfp4")
SHARE_OF_READ_FLOAT = 0.45
OVER_TORCH_BF16 = 3.0
WEIGHT_ONLY_OVER_TORCH = 0.85
INTEGER_OVER_TORCH = 1.3
INTEGER_CASES = (
    ("mxfp4", INT8_BLOCKS),
    ("mxfp4", "mxfp4"),
    ("mxfp4", "mxint8"),
    ("mxint8", "mxint8"),
    ("mxint8", INT8_BLOCKS),
)
"""Weights and activations whose product is an integer dot product: W4A8, W4A4, W4A8-INT8, INT8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerOptions:
    """What is measured."""

    shapes: Sequence[tuple[int, int]]
    formats: Sequence[str]
    activations: Sequence[str | None]
    decode_rows: Sequence[int]
    prefill_rows: int
    rounds: int
    pool_bytes: int = POOL_BYTES


def measure_decode(options: LayerOptions) -> tuple[list[Figure], list[str]]:
    """Measure all formats over all shapes; returns the figures and what the kernels refused."""
    figures: list[Figure] = []
    refusals: list[str] = []
    for rows_out, cols in options.shapes:
        for name in options.formats:
            found, refused = _decode_of(name, rows_out, cols, options)
            figures += found
            refusals += refused
            CONSOLE.print(f"  decode {name} {rows_out}x{cols}: {len(found)} figures", style="dim")
    return figures, refusals


def _decode_of(name: str, rows_out: int, cols: int, options: LayerOptions) -> tuple[list[Figure], list[str]]:
    weight = random_weight(name, rows_out, cols)
    copies = [weight] + [copy_weight(weight) for _ in range(options.pool_bytes // weight.num_bytes)]
    cases: dict[str, Callable[[], object]] = {"read": lambda: _read_all(copies)}
    prepared: dict[str, tuple[str | None, int, int]] = {}
    refused: list[str] = []
    for activations in options.activations:
        calls = [prepare(copy, activations) for copy in copies]
        if isinstance(calls[0], str):
            refused.append(f"{name} with {activations or 'float32'} activations: {calls[0]}")
            continue
        for rows in options.decode_rows:
            case = f"{name} {rows_out}x{cols}, {_words(activations)}, {rows} row{'s' * (rows > 1)}"
            cases[case] = _pool_run([call for call in calls if isinstance(call, Prepared)], rows, cols, rows_out)
            prepared[case] = (activations, rows, calls[0].num_bytes)
    torch_run, torch_copies = _torch_pool(rows_out, cols, options.pool_bytes)
    cases["torch bfloat16"] = torch_run
    times = take_turns(cases, options.rounds)
    pool_bytes = sum(copy.num_bytes for copy in copies)
    read = pool_bytes / times["read"].median
    torch_seconds = times["torch bfloat16"].median / torch_copies
    figures = []
    for case, (activations, rows, num_bytes) in prepared.items():
        seconds = times[case].median / len(copies)
        figures.append(
            Figure(
                case=case,
                unit="GB/s",
                **times[case].rate(num_bytes * len(copies) / 1e9),
                compared_to="read",
                ratio=num_bytes / seconds / read,
                goal=decode_goal(name, activations) if rows == 1 else None,
                facts={
                    "format": name,
                    "activations": activations,
                    "rows": rows,
                    "shape": [rows_out, cols],
                    "copies": len(copies),
                    "microseconds": seconds * 1e6,
                    "read_gb_per_second": read / 1e9,
                    "times_torch_bf16_one_row": torch_seconds / seconds,
                    "seconds": list(times[case].seconds),
                },
            )
        )
    return figures, refused


def decode_goal(name: str, activations: str | None) -> float | None:
    """Return the share of the read bandwidth that is asked for."""
    if activations is None:
        return SHARE_OF_READ_FLOAT
    if activations != INT8_BLOCKS:
        return None
    return SHARE_OF_READ.get(name, SHARE_OF_READ_OTHERS if name in OTHERS else None)


def _words(activations: str | None) -> str:
    return "float32" if activations is None else "8-bit blocks" if activations == INT8_BLOCKS else activations


def _pool_run(calls: Sequence[Prepared], rows: int, cols: int, rows_out: int) -> Callable[[], None]:
    inputs, out = torch.randn(rows, cols), torch.empty(rows, rows_out)

    def run() -> None:
        for call in calls:
            call.run(inputs, out)

    return run


def _read_all(copies: Sequence[Any]) -> None:
    assert NATIVE is not None
    for copy in copies:
        for part in copy.parts.values():
            num_bytes = part.numel() * part.element_size()
            if num_bytes >= 1 << 16:
                NATIVE.read_bytes(level(), part.data_ptr(), num_bytes, num_threads())


def _torch_pool(rows_out: int, cols: int, pool_bytes: int) -> tuple[Callable[[], None], int]:
    """torch's bfloat16 layer with one row over a pool of its own."""
    weight = torch.randn(rows_out, cols).to(torch.bfloat16)
    copies = [weight.clone() for _ in range(max(2, pool_bytes // (2 * weight.numel())))]
    inputs = torch.randn(1, cols).to(torch.bfloat16)

    def run() -> None:
        for copy in copies:
            functional.linear(inputs, copy)

    return run, len(copies)


def measure_prefill(options: LayerOptions, fma_limit: float) -> tuple[list[Figure], list[str]]:
    """Measure all formats in turns with torch, shape by shape."""
    figures: list[Figure] = []
    refusals: list[str] = []
    for rows_out, cols in options.shapes:
        inputs, out = torch.randn(options.prefill_rows, cols), torch.empty(options.prefill_rows, rows_out)
        cases: dict[str, Callable[[], object]] = _torch_layers(inputs, rows_out)
        described: dict[str, tuple[str, str | None]] = {}
        for name in options.formats:
            weight = random_weight(name, rows_out, cols)
            for activations in options.activations:
                call = prepare(weight, activations)
                if isinstance(call, str):
                    refusals.append(f"{name} with {activations or 'float32'} activations: {call}")
                    continue
                case = f"{name} {rows_out}x{cols}, {_words(activations)}"
                cases[case] = functools.partial(call.run, inputs, out)
                described[case] = (name, activations)
        times = take_turns(cases, options.rounds)
        flops = 2 * options.prefill_rows * rows_out * cols
        figures += _prefill_figures(times, described, flops, (rows_out, cols), fma_limit)
        CONSOLE.print(f"  prefill {rows_out}x{cols}: {len(cases)} cases", style="dim")
    return figures, refusals


def _torch_layers(inputs: Tensor, rows_out: int) -> dict[str, Callable[[], object]]:
    weight = torch.randn(rows_out, inputs.shape[1])
    half_inputs, half = inputs.to(torch.bfloat16), weight.to(torch.bfloat16)
    return {
        "torch float32": lambda: functional.linear(inputs, weight),
        "torch bfloat16": lambda: functional.linear(half_inputs, half),
    }


def _prefill_figures(
    times: dict[str, Times],
    described: dict[str, tuple[str, str | None]],
    flops: int,
    shape: tuple[int, int],
    fma_limit: float,
) -> list[Figure]:
    torch_rate = flops / times["torch float32"].median
    figures = []
    for case, value in times.items():
        name, activations = described.get(case, ("", None))
        goal = None
        if name:
            goal = WEIGHT_ONLY_OVER_TORCH if activations is None else None
            goal = INTEGER_OVER_TORCH if (name, activations) in INTEGER_CASES else goal
        figures.append(
            Figure(
                case=case if name else f"{case} {shape[0]}x{shape[1]}",
                unit="GFLOP/s",
                **value.rate(flops / 1e9),
                compared_to="torch float32",
                ratio=flops / value.median / torch_rate,
                goal=goal,
                facts={
                    "format": name,
                    "activations": activations,
                    "shape": list(shape),
                    "share_of_multiply_add": flops / value.median / fma_limit,
                    "seconds": list(value.seconds),
                },
            )
        )
    return figures
