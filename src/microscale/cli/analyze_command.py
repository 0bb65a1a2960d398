"""``microscale analyze``: what a model's numbers are like, what formats make of them, and what suits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microscale.cli.output import Column, console, print_table
from microscale.cli.parameters import result_command
from microscale.jobs.small_options import AnalyzeOptions

if TYPE_CHECKING:
    from microscale.jobs.analyze import AnalyzeResult


@result_command(AnalyzeOptions)
def analyze(result: AnalyzeResult, options: AnalyzeOptions) -> None:
    """Describe weights and inputs of every layer, the error of each format, and recommend formats with reasons.

    The layers of a local directory of safetensors files are read one at a time.

    Example: `microscale analyze MODEL --calibration text.txt -o report.html`
    """
    _print(result)
    if options.output is None:
        for one in result.analysis.recommendations:
            console.print(f"{one.role}, {one.side}: {one.reason}", markup=False, soft_wrap=True)
    if result.verdict is not None:
        console.print(f"verdict: {result.verdict.sentence}", markup=False, soft_wrap=True)
        console.print(f"next: {result.command}", markup=False, soft_wrap=True)
    wrote = f"wrote {options.output}" if options.output is not None else "no page was written (-o report.html)"
    console.print(f"{wrote}; {result.seconds:.1f} s", markup=False, soft_wrap=True)


def _print(result: AnalyzeResult) -> None:
    found = result.analysis
    columns = [
        Column(title="format"),
        Column(title="bits", is_number=True),
        Column(title="output error", is_number=True),
    ]
    rows = [[point.candidate, f"{point.bits:.2f}", f"{100 * point.output_error:.3g} %"] for point in found.curve]
    print_table("Geometric mean of the layers' output errors", columns, rows)
    columns = [Column(title=title) for title in ("tensors", "element", "block", "scale", "rule")]
    columns += [Column(title="bits", is_number=True), Column(title="QSNR", is_number=True)]
    advice = [
        [
            f"{one.role}, {one.side}",
            f"E{one.exponent_bits}M{one.mantissa_bits}",
            str(one.block_size),
            one.scale,
            one.rule,
            f"{one.bits:.2f}",
            f"{one.qsnr_db:.1f} dB",
        ]
        for one in found.recommendations
    ]
    print_table("What suits each class of tensors", columns, advice)
    for one in result.massive:
        console.print(f"massive values in {one.title}: {one.words}", markup=False, soft_wrap=True)
