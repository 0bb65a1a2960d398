"""``microscale quantize``: a Hugging Face model in, a checkpoint out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microscale.cli.allocate_command import point_text
from microscale.cli.inspect_command import group_names
from microscale.cli.output import console
from microscale.cli.parameters import result_command
from microscale.errors import counted
from microscale.jobs.quantize_options import QuantizeOptions

if TYPE_CHECKING:
    from microscale.jobs.quantize import QuantizeResult


@result_command(QuantizeOptions)
def quantize(result: QuantizeResult, _: QuantizeOptions) -> None:
    """Quantize a model and write the checkpoint.

    Examples: `microscale quantize MODEL -f mxfp4 -o OUT`,
    `microscale quantize MODEL -f mxfp4 -a mxfp8 --rule '*.down_proj=mxfp8' -o OUT`,
    `microscale quantize MODEL -f mxfp4 -a mxfp4 --method mr-gptq --calibration text.txt -o OUT`,
    `microscale quantize MODEL --method auto --bits 4.5 --calibration text.txt -o OUT`
    """
    report, written = result.report, result.checkpoint
    assert written is not None  # the command line always names an output
    inspection = written.inspection
    lines: list[str] = []
    if result.allocation is not None:
        solution = result.allocation.solution
        point = point_text(solution.point, result.allocation.budget)
        lines.append(f"chosen from a front of {len(solution.front)}: {point}")
    lines += [
        f"{counted(count, 'layer')}: weights {weights}, activations {inputs or 'not quantized'}"
        for (weights, inputs), count in result.schemes.items()
    ]
    if report.plan.unquantized:
        lines.append(f"left alone: {', '.join(group_names(report.plan.unquantized))}")
    lines.append(f"{report.bits_per_weight:.3f} bits per quantized weight")
    lines.append(inspection.size_words(result.before))
    lines += [f"note: {note}" for note in result.notes]
    lines.append(f"wrote {written.output} (layout {written.layout}) in {result.seconds:.1f} s")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
