"""``microscale quantize``: a Hugging Face model in, a checkpoint out."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from microscale.cli.allocate_command import point_facts, point_text
from microscale.cli.inspect_command import group_names
from microscale.cli.output import (
    JsonOption,
    activation_word,
    console,
    format_word,
    print_json,
    tell_missing_kernels,
)
from microscale.cli.parameters import job_command
from microscale.cli.reporter import ConsoleReporter
from microscale.errors import RecipeError
from microscale.jobs.quantize_options import QuantizeOptions

if TYPE_CHECKING:
    from microscale.jobs.allocate import Allocation
    from microscale.jobs.quantize import Checkpoint, QuantizeResult


@job_command(QuantizeOptions)
def quantize(options: QuantizeOptions, as_json: JsonOption = False) -> None:
    """Quantize a model and write the checkpoint.

    Examples: `microscale quantize MODEL -f mxfp4 -o OUT`,
    `microscale quantize MODEL -f mxfp4 -a mxfp8 --rule '*.down_proj=mxfp8' -o OUT`,
    `microscale quantize MODEL -f mxfp4 -a mxfp4 --method mr-gptq --calibration text.txt -o OUT`,
    `microscale quantize MODEL --method auto --bits 4.5 --calibration text.txt -o OUT`
    """
    from microscale.algorithms.registry import BEST
    from microscale.jobs.quantize import quantize as quantize_job

    tell_missing_kernels()
    words = options.recipe
    if words.effort is not None and words.file is None and BEST not in str(words.method).split("+"):
        raise RecipeError(f"--effort {words.effort} chooses a chain of method {BEST}; add --method {BEST}")
    result = quantize_job(options, ConsoleReporter())
    assert result.checkpoint is not None  # the command line always names an output
    if as_json:
        print_json(_facts(result, result.checkpoint))
    else:
        _tell(result, result.checkpoint)


def _schemes(result: QuantizeResult) -> dict[tuple[str, str | None], int]:
    """Count the layers of each pair of words for weights and inputs; None where inputs are not rounded."""
    layers = result.report.plan.layers
    return Counter(
        (format_word(one.format), None if one.activations is None else activation_word(one.activations))
        for one in layers
    )


def _facts(result: QuantizeResult, written: Checkpoint) -> dict[str, Any]:
    plan, inspection = result.report.plan, written.inspection
    return {
        "output": str(written.output),
        "layout": written.layout,
        "layers": len(plan.layers),
        "schemes": [
            {"weights": weights, "activations": inputs, "layers": count}
            for (weights, inputs), count in _schemes(result).items()
        ],
        "unquantized": list(plan.unquantized),
        "attention": {"products": inspection.attention, "kv_cache": inspection.kv_cache},
        "bits_per_weight": result.report.bits_per_weight,
        "bits_per_weight_model": inspection.bits_per_weight,
        "bytes": inspection.num_bytes,
        "allocation": None if result.allocation is None else _allocation_facts(result.allocation),
        "notes": list(result.notes),
        "seconds": result.seconds,
    }


def _tell(result: QuantizeResult, written: Checkpoint) -> None:
    from microscale.report.comparison import size_text

    report, inspection = result.report, written.inspection
    lines: list[str] = []
    if result.allocation is not None:
        solution = result.allocation.solution
        point = point_text(solution.point, result.allocation.budget)
        lines.append(f"chosen from a front of {len(solution.front)}: {point}")
    lines += [
        f"{count} layers: weights {weights}, activations {inputs or 'not quantized'}"
        for (weights, inputs), count in _schemes(result).items()
    ]
    if report.plan.unquantized:
        lines.append(f"left alone: {', '.join(group_names(report.plan.unquantized))}")
    lines.append(
        f"{report.bits_per_weight:.3f} bits per quantized weight;"
        f" {inspection.bits_per_weight:.3f} over the whole model, {size_text(inspection.num_bytes)}"
    )
    lines += [f"note: {note}" for note in result.notes]
    lines.append(f"wrote {written.output} (layout {written.layout}) in {result.seconds:.1f} s")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _allocation_facts(found: Allocation) -> dict[str, Any]:
    from microscale.recipes.writing import recipe_text

    return {
        "budget": found.budget.amount,
        "result": point_facts(found.solution.point),
        "front": [point_facts(point) for point in found.solution.front],
        "recipe": recipe_text(found.recipe),
    }
