"""``microscale quantize``: a Hugging Face model in, a checkpoint out."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microscale import __version__
from microscale.calibration import DEFAULT_SAMPLES, DEFAULT_WINDOW
from microscale.calibration.texts import DEFAULT_FIELD
from microscale.checkpoint import check_target
from microscale.cli.allocate_command import point_facts, point_text
from microscale.cli.inspect_command import group_names
from microscale.cli.output import (
    JsonOption,
    SeedOption,
    activation_word,
    command,
    console,
    format_word,
    print_json,
    progress_bar,
    tell_missing_kernels,
)
from microscale.errors import CalibrationError, CheckpointWriteError, ModelError, RecipeError
from microscale.formats import RangeKind
from microscale.planning import Inspection, inspect_checkpoint
from microscale.recipes import QuantizationReport, Recipe, load_recipe, recipe_text
from microscale.report import size_text

if TYPE_CHECKING:
    from microscale.integrations.allocating import AutoRecipe, FoundAllocation


@command
def quantize(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a transformers causal language model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="Format of the weights: name or spec (method auto: a list).")
    ] = None,
    activations: Annotated[
        str | None, typer.Option("--activations", "-a", help="Format of the layer inputs (default: not quantized).")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option("--attention", help="Format of what enters the products of attention (simulated in floats)."),
    ] = None,
    kv_cache: Annotated[
        str | None, typer.Option("--kv-cache", help="Format of keys and values as they are stored, likewise.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Glob of layers left out by default (lm_head, embeddings).")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Glob of layers to leave alone (a --rule wins over it).")
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", help="GLOB=WEIGHTS[/ACTIVATIONS] for some layers; later ones win; 'none' leaves alone."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="YAML file with all of this instead.")] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Method or chain of steps, see `microscale methods` (default: rtn).")
    ] = None,
    bits: Annotated[
        float | None, typer.Option("--bits", help="Budget for each weight, of method auto, micromix or adaptive-2-4.")
    ] = None,
    effort: Annotated[
        str | None, typer.Option("--effort", help="Of method best: fast (default, no gradients), good or max.")
    ] = None,
    part: Annotated[
        str | None, typer.Option("--part", help="Of a model that sees: language (default), vision or all.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="Text file, JSON lines or dataset name to calibrate on.")
    ] = None,
    calibration_field: Annotated[
        str, typer.Option("--calibration-field", help="Field of JSON lines or of a dataset that holds the text.")
    ] = DEFAULT_FIELD,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Windows of calibration text.")] = DEFAULT_SAMPLES,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens in a window, BOS included.")] = DEFAULT_WINDOW,
    feed: Annotated[
        str,
        typer.Option("--feed", help="What a layer is measured on: quantized (layers before it, default) or original."),
    ] = "quantized",
    offload: Annotated[
        Path | None,
        typer.Option(
            "--offload",
            help="Directory for layer inputs and finished layers: the model is read layer by layer, and the same"
            " command goes on after an interruption.",
        ),
    ] = None,
    observer: Annotated[
        str | None,
        typer.Option("--observer", help="Of static activation ranges: minmax, percentile(99.9), mse (default), kl …"),
    ] = None,
    layout: Annotated[
        str | None, typer.Option("--layout", help="auto (default), compressed-tensors, quark or microscale.")
    ] = None,
    nan: Annotated[str | None, typer.Option("--nan", help="Non-finite weights: raise (default) or poison.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output directory.")] = False,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest file, e.g. 5GB.")] = "5GB",
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """Quantize a model and write the checkpoint.

    Examples: `microscale quantize MODEL -f mxfp4 -o OUT`,
    `microscale quantize MODEL -f mxfp4 -a mxfp8 --rule '*.down_proj=mxfp8' -o OUT`,
    `microscale quantize MODEL -f mxfp4 -a mxfp4 --method mr-gptq --calibration text.txt -o OUT`,
    `microscale quantize MODEL --method auto --bits 4.5 --calibration text.txt -o OUT`
    """
    from microscale.integrations.calibration import CalibrationOptions, check_tokenizer
    from microscale.integrations.quantization import quantize_original
    from microscale.integrations.saving import check_shard_size, save_model

    tell_missing_kernels()
    started = time.perf_counter()
    flags = {
        "format": format,
        "activations": activations,
        "attention": attention,
        "kv_cache": kv_cache,
        "include": tuple(include or ()) or None,
        "exclude": tuple(exclude or ()) or None,
        "rules": tuple(rule or ()) or None,
        "method": method,
        "bits": bits,
        "effort": effort,
        "part": part,
        "nan": nan,
    }
    chosen = _recipe(recipe, flags, layout)
    _refuse_untaught(chosen, calibration)
    _refuse_source(model, output)
    _refuse_inside(offload, output)
    check_target(output, overwrite=overwrite)
    check_shard_size(max_shard_size)
    notes: list[str] = []
    tokenizer = _tokenizer(model, notes)
    if calibration is not None:
        check_tokenizer(tokenizer)
    options = CalibrationOptions(
        source=calibration,
        field=calibration_field,
        samples=samples,
        window=window,
        feed=feed,
        seed=seed,
        observer=observer,
    )
    done = quantize_original(
        model, chosen, options, version=__version__, stages=progress_bar, tokenizer=tokenizer, offload=offload
    )
    report = done.report
    written = save_model(
        done.model,
        output,
        version=__version__,
        layout=report.plan.layout or "auto",
        tokenizer=tokenizer,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
    )
    if done.store is not None:
        done.store.clear()
    seconds = time.perf_counter() - started
    _tell(output, written, report, inspect_checkpoint(output), [*done.notes, *notes], seconds, done.allocation, as_json)


def _recipe(path: Path | None, flags: dict[str, Any], layout: str | None) -> Recipe | AutoRecipe:
    from microscale.algorithms import BEST
    from microscale.integrations.quantization import choose_recipe

    given = {key: value for key, value in flags.items() if value is not None}
    if path is not None:
        if given:
            option = next(iter(given)).replace("_", "-")
            raise RecipeError(f"give either --recipe or --{option}, not both; write all of it into the recipe")
        found = load_recipe(path)
        return found.model_copy(update={"layout": layout or found.layout or "auto"})
    if "effort" in given and BEST not in str(given.get("method")).split("+"):
        raise RecipeError(f"--effort {given['effort']} chooses a chain of method {BEST}; add --method {BEST}")
    return choose_recipe(given.pop("format", None), given.pop("bits", None), layout=layout or "auto", **given)


def _refuse_untaught(recipe: Recipe | AutoRecipe, calibration: str | None) -> None:
    """Refuse what needs text without any: an allocation, and static activation ranges, which could not run."""
    if not isinstance(recipe, Recipe):
        if calibration is None:
            raise CalibrationError("method auto measures layers on text: give --calibration FILE")
        return
    for asked in (recipe.activations, *(rule.activations for rule in recipe.layer_rules)):
        spec = None if asked is None else asked.record
        if spec is not None and spec.range is RangeKind.STATIC and calibration is None:
            raise RecipeError(f"activations {asked} need text to measure their range on: give --calibration FILE")


def _refuse_source(model: str, output: Path) -> None:
    """Refuse to write over the model that is being read.

    Raises:
        CheckpointWriteError: the output is the model's directory, or holds it.
    """
    source, target = Path(model).resolve(), output.resolve()
    if source.exists() and (target == source or target in source.parents):
        raise CheckpointWriteError(f"{output} is (or holds) the model that is read; choose another place with -o")


def _refuse_inside(offload: Path | None, output: Path) -> None:
    """Refuse to keep an unfinished job where the checkpoint will be written.

    Raises:
        CheckpointWriteError: the directory of ``--offload`` is the output, or lies in it.
    """
    target = output.resolve()
    if offload is not None and (offload.resolve() == target or target in offload.resolve().parents):
        raise CheckpointWriteError(f"--offload {offload} lies in {output}, which is written at the end; choose another")


def _tokenizer(model: str, notes: list[str]) -> Any:
    from microscale.integrations.loading import load_tokenizer

    try:
        return load_tokenizer(model)
    except ModelError:
        notes.append(f"{model} has no tokenizer that can be loaded, so none was copied")
        return None


def _tell(
    output: Path,
    layout: str,
    report: QuantizationReport,
    inspection: Inspection,
    notes: list[str],
    seconds: float,
    allocation: FoundAllocation | None,
    as_json: bool,
) -> None:
    schemes = Counter((format_word(layer.format), activation_word(layer.activations)) for layer in report.plan.layers)
    if as_json:
        print_json(
            {
                "output": str(output),
                "layout": layout,
                "layers": len(report.plan.layers),
                "schemes": [
                    {"weights": weights, "activations": None if acts == "None" else acts, "layers": count}
                    for (weights, acts), count in schemes.items()
                ],
                "unquantized": list(report.plan.unquantized),
                "attention": {"products": inspection.attention, "kv_cache": inspection.kv_cache},
                "bits_per_weight": report.bits_per_weight,
                "bits_per_weight_model": inspection.bits_per_weight,
                "bytes": inspection.num_bytes,
                "allocation": None if allocation is None else _allocation_facts(allocation),
                "notes": notes,
                "seconds": seconds,
            }
        )
        return
    if allocation is not None:
        point = point_text(allocation.solution.point, allocation.budget)
        console.print(f"chosen from a front of {len(allocation.solution.front)}: {point}", markup=False, soft_wrap=True)
    for (weights, acts), count in schemes.items():
        inputs = "not quantized" if acts == "None" else acts
        console.print(f"{count} layers: weights {weights}, activations {inputs}", markup=False)
    if report.plan.unquantized:
        console.print(f"left alone: {', '.join(group_names(report.plan.unquantized))}", markup=False, soft_wrap=True)
    console.print(
        f"{report.bits_per_weight:.3f} bits per quantized weight;"
        f" {inspection.bits_per_weight:.3f} over the whole model, {size_text(inspection.num_bytes)}"
    )
    for note in notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(f"wrote {output} (layout {layout}) in {seconds:.1f} s", markup=False, soft_wrap=True)


def _allocation_facts(allocation: FoundAllocation) -> dict[str, Any]:
    return {
        "budget": allocation.budget.amount,
        "result": point_facts(allocation.solution.point),
        "front": [point_facts(point) for point in allocation.solution.front],
        "recipe": recipe_text(allocation.recipe),
    }
