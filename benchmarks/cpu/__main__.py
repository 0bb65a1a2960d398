"""Measure the CPU kernels against the limits of the machine and against peers; write tables and JSON.

    make bench-cpu                                             # everything (half an hour)
    python -m benchmarks.cpu --quick                           # a look: few formats, few rounds
    python -m benchmarks.cpu --only layers --formats mxfp4     # one part
    python -m benchmarks.cpu --peer-python PEER/bin/python     # with llama.cpp; see peer_llamacpp.py

Nothing here is a test: speed is never asserted. Each part measures the limits of the machine at its begin and its
end and says how busy other processes kept it, so that a reader sees what the figures are worth.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.cpu import layers, memory, models, quantizing
from benchmarks.cpu.limits import LimitLoops, Limits, measure_limits
from benchmarks.cpu.results import CONSOLE, Figure, Verdict, show, write
from benchmarks.cpu.timing import ForeignLoad, wait_until_quiet

from microscale.formats import NAMED_FORMATS
from microscale.kernels.cpu.native import NATIVE, UNAVAILABLE

PARTS = ("limits", "layers", "prefill", "quantize", "models", "memory")
QUICK_FORMATS = ("mxfp4", "mxfp8_e4m3", "mxfp6_e2m3", "nvfp4")
NOISY_CORES = 0.1
Measured = tuple[list[Figure], dict[str, Any]]


def main() -> int:
    """Run the parts that were asked for."""
    options = parse_arguments()
    if NATIVE is None:
        CONSOLE.print(UNAVAILABLE, style="bold red")
        return 1
    torch.set_num_threads(options.threads)
    loops = LimitLoops()
    parts: dict[str, Callable[[Limits], Measured]] = {
        "limits": lambda limits: ([], {}),
        "layers": lambda limits: measure_layers(options),
        "prefill": lambda limits: measure_prefill(options, limits),
        "quantize": lambda limits: measure_quantize(options, loops),
        "models": lambda limits: models.measure_models(model_options(options)),
        "memory": lambda limits: measure_memory(options),
    }
    everything: list[Figure] = []
    for name in options.only:
        everything += run_part(name, parts[name], loops, options)
    counts = {verdict: sum(figure.verdict is verdict for figure in everything) for verdict in Verdict}
    CONSOLE.print(
        f"goals met: {counts[Verdict.MET]}, missed: {counts[Verdict.MISSED]}, unclear: {counts[Verdict.NOISY]}"
    )
    return 0


def run_part(
    name: str, measure: Callable[[Limits], Measured], loops: LimitLoops, options: argparse.Namespace
) -> list[Figure]:
    """Measure one part between two measurements of the limits, print and write it."""
    waited = wait_until_quiet(NOISY_CORES, options.wait_quiet)
    load = ForeignLoad()
    limits, begin = measure_limits(loops, options.rounds)
    figures, facts = measure(limits)
    _, end = measure_limits(loops, options.rounds)
    cores = load.cores()
    is_noisy = cores is not None and cores > NOISY_CORES
    figures = [replace(figure, is_noisy=is_noisy and name != "memory") for figure in figures]
    limit_rows = [*begin, *(Figure(case=f"{row.case}, at the end", unit=row.unit, median=row.median) for row in end)]
    show(f"{name}: limits of the machine", limit_rows)
    if figures:
        show(f"{name}, {options.threads} threads", figures)
    noise = "unknown" if cores is None else f"{cores:.2f} cores busy with other things"
    CONSOLE.print(f"{name}: {noise}" + (": NOISY, measure again" if is_noisy else ""), style="red" if is_noisy else "")
    for text in [*facts.get("refused", []), *facts.get("failures", [])]:
        CONSOLE.print(f"  not measured: {text}", style="yellow", markup=False)
    facts |= {"foreign_cores": cores, "foreign_cores_before": waited, "rounds": options.rounds}
    if not options.no_json:
        path = write(name, [*limit_rows, *figures], facts)
        CONSOLE.print(f"written: {path}")
    return figures


def measure_layers(options: argparse.Namespace) -> Measured:
    """Decode."""
    figures, refused = layers.measure_decode(layer_options(options))
    return figures, {"refused": sorted(set(refused))}


def measure_prefill(options: argparse.Namespace, limits: Limits) -> Measured:
    """Prefill."""
    figures, refused = layers.measure_prefill(layer_options(options), limits.flops)
    return figures, {"refused": sorted(set(refused))}


def layer_options(options: argparse.Namespace) -> layers.LayerOptions:
    """What a quick and a whole run measure of layers."""
    quick = options.quick
    return layers.LayerOptions(
        shapes=layers.SHAPES[:1] if quick else layers.SHAPES,
        formats=options.formats or (QUICK_FORMATS if quick else layers.FORMATS),
        activations=(layers.INT8_BLOCKS, None) if quick else (layers.INT8_BLOCKS, None, "mxfp4", "mxfp8", "mxint8"),
        decode_rows=(1,) if quick else (1, 4, 16),
        prefill_rows=512,
        rounds=options.rounds,
    )


def measure_quantize(options: argparse.Namespace, loops: LimitLoops) -> Measured:
    """quantize and dequantize."""
    chosen = quantizing.QuantizeOptions(
        formats=options.formats or (QUICK_FORMATS if options.quick else tuple(NAMED_FORMATS)),
        rows=8192,
        cols=8192,
        reference_rows=512,
        rounds=options.rounds,
    )
    return quantizing.measure_quantize(chosen, loops), {"rows": chosen.rows, "cols": chosen.cols}


def model_options(options: argparse.Namespace) -> models.ModelOptions:
    """What a quick and a whole run measure of models."""
    return models.ModelOptions(
        peer_python=options.peer_python,
        work_dir=options.work_dir,
        threads=options.threads,
        rounds=1 if options.quick else 3,
        prompts=(256,) if options.quick else (256, 512),
        new_tokens=32,
        ours=models.OURS if options.quick else (*models.OURS, *models.OURS_OTHERS),
        peer_types=("mxfp4",) if options.quick else ("mxfp4", *models.PEER_OTHERS),
        has_torch="bf16",
    )


def measure_memory(options: argparse.Namespace) -> Measured:
    """Memory."""
    cases = [("mxfp4", "auto")] if options.quick else [("mxfp4", "auto"), ("mxfp4", "microscale"), ("nvfp4", "auto")]
    return memory.measure_memory(options.work_dir, cases, ("load", "decoder"))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.cpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--quick", action="store_true", help="few formats and shapes, three rounds")
    parser.add_argument("--rounds", type=int, help="counted runs of every case (default 9, quick 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of us and of every peer")
    parser.add_argument("--formats", nargs="+", help="names of formats for layers, prefill and quantize")
    parser.add_argument("--peer-python", help="interpreter that has llama-cpp-python and gguf")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "microscale-bench")
    parser.add_argument("--wait-quiet", type=float, default=0.0, help="seconds to wait for a quiet machine")
    parser.add_argument("--no-json", action="store_true", help="print only")
    options = parser.parse_args()
    options.rounds = options.rounds or (3 if options.quick else 9)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    sys.exit(main())
