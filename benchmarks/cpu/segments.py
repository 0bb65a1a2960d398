"""Layers in segments against their segments' own kernels, and MX+ against MX: ratios of speed, measured in turns.

    python -m benchmarks.cpu.segments

What segments should take is the mean of what a whole layer in each of their formats takes, weighted by their channels.
Decoding (one row) goes through as many copies of a weight as lie outside of the caches.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.cpu.linear_calls import Prepared, copy_weight, prepare, random_weight
from benchmarks.cpu.results import CONSOLE
from benchmarks.cpu.timing import ForeignLoad, take_turns

SHARES = {"mxfp4": 5, "mxfp6_e2m3": 2, "mxfp8": 1}
"""Eighths of the channels of each segment."""
SHAPES = ((4096, 4096), (2048, 8192))
EIGHT_BIT = "int8/32:fp32:amax"
COPIES_BYTES = 200_000_000


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "segments.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = ForeignLoad()
    rows: list[dict[str, object]] = []
    for (height, width), tokens in itertools.product(SHAPES, (1, 512)):
        for inputs in ("own", EIGHT_BIT, None):
            if tokens > 1 and inputs != "own":
                continue
            rows.append(segments_row(height, width, tokens, inputs, options.rounds))
            CONSOLE.print(rows[-1])
    for (height, width), inputs in itertools.product(SHAPES, (EIGHT_BIT, None)):
        rows.append(plus_row(height, width, inputs, options.rounds))
        CONSOLE.print(rows[-1])
    facts = {"threads": options.threads, "rounds": options.rounds, "foreign_cores": load.cores(), "rows": rows}
    options.out.write_text(json.dumps(facts, indent=1) + "\n")


def runs(fmt: str, rows: int, cols: int, tokens: int, inputs: str | None) -> Callable[[], None]:
    """Return a call that multiplies by every copy of a weight in turn; its time is divided by their number."""
    weight = random_weight(fmt, rows, cols)
    count = max(1, round(COPIES_BYTES / weight.num_bytes)) if tokens == 1 else 1
    copies = [prepare(copy_weight(weight) if i else weight, fmt if inputs == "own" else inputs) for i in range(count)]
    calls: list[Prepared] = []
    for made in copies:
        if isinstance(made, str):
            raise SystemExit(f"{fmt}: {made}")
        calls.append(made)
    values, out = torch.randn(tokens, cols), torch.empty(tokens, rows)

    def run() -> None:
        for call in calls:
            call.run(values, out)

    run.count = count  # pyright: ignore[reportFunctionMemberAccess]
    return run


def seconds(cases: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median seconds of one product of each case."""
    times = take_turns(cases, rounds)
    return {name: times[name].median / getattr(case, "count", 1) for name, case in cases.items()}


def segments_row(rows: int, cols: int, tokens: int, inputs: str | None, rounds: int) -> dict[str, object]:
    """Return the speed of segments as a share of what their own kernels would give."""
    words = ",".join(f"{fmt}*{cols * share // 8}" for fmt, share in SHARES.items())
    cases = {fmt: runs(fmt, rows, cols, tokens, inputs) for fmt in SHARES}
    cases["segments"] = runs(f"segments({words})", rows, cols, tokens, inputs)
    found = seconds(cases, rounds)
    expected = sum(found[fmt] * share / 8 for fmt, share in SHARES.items())
    return {
        "what": "segments",
        "shape": [rows, cols],
        "tokens": tokens,
        "inputs": inputs or "float32",
        "microseconds": {name: round(1e6 * value, 1) for name, value in found.items()},
        "speed": round(expected / found["segments"], 3),
    }


def plus_row(rows: int, cols: int, inputs: str | None, rounds: int) -> dict[str, object]:
    """Return the decoding speed of MXFP4+ as a share of MXFP4's."""
    found = seconds({fmt: runs(fmt, rows, cols, 1, inputs) for fmt in ("mxfp4", "mxfp4_plus")}, rounds)
    return {
        "what": "mxfp4_plus against mxfp4",
        "shape": [rows, cols],
        "tokens": 1,
        "inputs": inputs or "float32",
        "microseconds": {name: round(1e6 * value, 1) for name, value in found.items()},
        "speed": round(found["mxfp4"] / found["mxfp4_plus"], 3),
    }


if __name__ == "__main__":
    main()
