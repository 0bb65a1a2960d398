"""``microscale bench``: how many tokens per second a model takes in and gives out on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microscale.cli.output import Column, console, print_table
from microscale.cli.parameters import result_command
from microscale.cli.runtime import runtime_text
from microscale.jobs.small_options import BenchOptions

if TYPE_CHECKING:
    from microscale.jobs.bench import BenchResult


@result_command(BenchOptions)
def bench(result: BenchResult, _: BenchOptions) -> None:
    """Measure tokens per second of a prompt (prefill) and of single tokens after it (decode).

    Example: `microscale bench OUT --prompt-tokens 256 --new-tokens 128 --activations int8/32:fp32:amax`
    """
    executed, speeds, decoder = result.executed, result.speeds, result.executed.decoder
    columns = [Column(title="tokens/s"), *(Column(title=name, is_number=True) for name in ("median", "min", "max"))]
    rows = [
        [f"{name} ({count})", f"{speed.median:.1f}", f"{speed.lowest:.1f}", f"{speed.highest:.1f}"]
        for name, count, speed in (
            ("prefill", speeds.prompt_tokens, speeds.prefill),
            ("decode", speeds.new_tokens, speeds.decode),
        )
    ]
    print_table(result.label, columns, rows)
    lines = [f"ran by: {runtime_text(executed.runtime)}"]
    named = {"weights": executed.formats, "activations": executed.activations}
    named |= {} if decoder is None else {"linear layers": decoder.linear_layers}
    lines += [
        f"{name}: " + ", ".join(f"{word} × {n}" for word, n in found.items()) for name, found in named.items() if found
    ]
    read = f"weights read per token: {executed.weight_bytes_per_token / 1e6:.1f} MB"
    lines.append(read if decoder is None else f"{read}, {decoder.weight_bytes_per_second / 1e9:.1f} GB/s")
    shares = result.milliseconds_per_token
    if shares is not None:
        lines.append("ms per token: " + ", ".join(f"{name} {value:.2f}" for name, value in shares.items()))
    lines.append(f"resident memory: {result.resident_bytes / 1e6:.0f} MB; start: {result.start_seconds:.1f} s")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
