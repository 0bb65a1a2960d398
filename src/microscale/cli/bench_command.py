"""``microscale bench``: how many tokens per second a model takes in and gives out on this machine."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from microscale.cli.output import Column, JsonOption, console, print_json, print_table, tell_missing_kernels
from microscale.cli.parameters import job_command
from microscale.cli.reporter import ConsoleReporter
from microscale.cli.runtime import runtime_text
from microscale.jobs.bench_options import BenchOptions

if TYPE_CHECKING:
    from microscale.jobs.bench import BenchResult, ExecutedModel
    from microscale.planning.bench import Speed


@job_command(BenchOptions)
def bench(options: BenchOptions, as_json: JsonOption = False) -> None:
    """Measure tokens per second of a prompt (prefill) and of single tokens after it (decode).

    Example: `microscale bench OUT --prompt-tokens 256 --new-tokens 128 --activations int8/32:fp32:amax`
    """
    from microscale.jobs.bench import bench as bench_job

    tell_missing_kernels()
    result = bench_job(options, ConsoleReporter())
    if as_json:
        print_json(_facts(result))
    else:
        _show(result)


def _model_text(options: BenchOptions) -> str:
    return str(options.model or f"random llama {options.random_llama}")


def _facts(result: BenchResult) -> dict[str, Any]:
    options = result.requested
    requested = {name: getattr(options, name) for name in ("format", "activations", "dtype", "cache", "threads")}
    return {
        "requested": {"model": _model_text(options), **requested},
        "executed": _executed_facts(result.executed),
        "start_seconds": result.start_seconds,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "repeat": options.repeat,
        "prefill": _speed_facts(result.speeds.prefill),
        "decode": _speed_facts(result.speeds.decode),
        "milliseconds_per_token": result.milliseconds_per_token,
        "resident_bytes": result.resident_bytes,
    }


def _executed_facts(executed: ExecutedModel) -> dict[str, Any]:
    facts = dataclasses.asdict(executed)
    runtime, decoder = facts.pop("runtime"), facts.pop("decoder")
    return {**facts, **runtime, **(decoder or {})}


def _speed_facts(speed: Speed) -> dict[str, Any]:
    facts = {"median": speed.median, "min": speed.lowest, "max": speed.highest}
    return {"tokens_per_second": facts | {"values": list(speed.values)}}


def _show(result: BenchResult) -> None:
    executed, speeds, decoder = result.executed, result.speeds, result.executed.decoder
    columns = [Column(title="tokens/s"), *(Column(title=name, is_number=True) for name in ("median", "min", "max"))]
    rows = [
        [f"{name} ({count})", f"{speed.median:.1f}", f"{speed.lowest:.1f}", f"{speed.highest:.1f}"]
        for name, count, speed in (
            ("prefill", speeds.prompt_tokens, speeds.prefill),
            ("decode", speeds.new_tokens, speeds.decode),
        )
    ]
    print_table(_model_text(result.requested), columns, rows)
    lines = [f"ran by: {runtime_text(executed.runtime)}"]
    counted = {"weights": executed.formats, "activations": executed.activations}
    counted |= {} if decoder is None else {"linear layers": decoder.linear_layers}
    lines += [f"{name}: " + ", ".join(f"{word} × {n}" for word, n in found.items()) for name, found in counted.items()]
    read = f"weights read per token: {executed.weight_bytes_per_token / 1e6:.1f} MB"
    lines.append(read if decoder is None else f"{read}, {decoder.weight_bytes_per_second / 1e9:.1f} GB/s")
    shares = result.milliseconds_per_token
    if shares is not None:
        lines.append("ms per token: " + ", ".join(f"{name} {value:.2f}" for name, value in shares.items()))
    lines.append(f"resident memory: {result.resident_bytes / 1e6:.0f} MB; start: {result.start_seconds:.1f} s")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
