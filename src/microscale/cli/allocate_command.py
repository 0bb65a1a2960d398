"""``microscale allocate``: the best format for every layer under a budget, as a recipe."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from microscale.algorithms import parse_method
from microscale.calibration.texts import DEFAULT_FIELD
from microscale.checkpoint import check_text_target, write_text_file
from microscale.cli.output import (
    Column,
    JsonOption,
    SeedOption,
    command,
    console,
    error_console,
    print_json,
    print_table,
    progress_bar,
    tell_missing_kernels,
)
from microscale.errors import CalibrationError
from microscale.planning import (
    DEFAULT_FORMATS,
    AllocatedLayer,
    Budget,
    BudgetUnit,
    Candidate,
    FrontPoint,
    LayerTable,
    Sensitivity,
    Solution,
    amount_text,
    parse_budget,
    parse_candidates,
    parse_fixed,
    parse_sensitivity,
)
from microscale.recipes import recipe_text
from microscale.report import allocation_plot, check_picture

if TYPE_CHECKING:
    from microscale.integrations.allocating import FoundAllocation

DEFAULT_SAMPLES, DEFAULT_WINDOW = 8, 512
_UNITS = {BudgetUnit.BITS: "bits per weight", BudgetUnit.BYTES: "bytes", BudgetUnit.MILLISECONDS: "milliseconds"}


@command
def allocate(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a transformers causal language model.")],
    budget: Annotated[str, typer.Option("--budget", "-b", help="4.5bits, 1.2GB (whole model) or 20ms.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write, as YAML.")],
    formats: Annotated[
        str,
        typer.Option(
            "--formats", "-f", help="Candidates WEIGHTS[/ACTIVATIONS][@METHOD] with commas; none leaves alone."
        ),
    ] = DEFAULT_FORMATS,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="Text file, JSON lines or dataset name to measure on.")
    ] = None,
    calibration_field: Annotated[
        str, typer.Option("--calibration-field", help="Field of JSON lines or of a dataset that holds the text.")
    ] = DEFAULT_FIELD,
    sensitivity: Annotated[
        str, typer.Option("--sensitivity", help="fisher (default, one backward pass), kl (slow, exact) or error.")
    ] = "fisher",
    method: Annotated[str, typer.Option("--method", help="Method of the recipe, see `microscale methods`.")] = "rtn",
    effort: Annotated[str, typer.Option("--effort", help="Of method best: fast, good or max.")] = "fast",
    fuse: Annotated[
        bool, typer.Option("--fuse", help="Layers that read one input (qkv, gate/up) get one format.")
    ] = False,
    fix: Annotated[
        list[str] | None, typer.Option("--fix", help="ROLE=FORMAT or GLOB=FORMAT, e.g. mlp.down=mxfp8; later ones win.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Also allocate these (roles or globs): lm_head, embedding.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option("--exclude", help="Glob of layers to leave alone.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Windows that are measured on.")] = DEFAULT_SAMPLES,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens in a window, BOS included.")] = DEFAULT_WINDOW,
    latency_tokens: Annotated[
        int, typer.Option("--latency-tokens", min=1, help="Rows of input that a budget in ms is measured with.")
    ] = 1,
    points: Annotated[int, typer.Option("--points", min=2, max=200, help="Budgets on the Pareto front.")] = 25,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw the front: .png, .svg or .pdf.")] = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """Measure how much each layer suffers in each format and find the optimum under a budget.

    Example: `microscale allocate MODEL --budget 4.5bits --calibration text.txt -o recipe.yaml`, then
    `microscale quantize MODEL --recipe recipe.yaml -o OUT`
    """
    from microscale.integrations.allocating import AllocationOptions, allocate_model
    from microscale.integrations.calibration import CalibrationOptions, find_tokenizer
    from microscale.integrations.loading import load_original

    tell_missing_kernels()
    started = time.perf_counter()
    options = AllocationOptions(
        budget=parse_budget(budget),
        candidates=parse_candidates(formats),
        fixed=tuple(parse_fixed(text) for text in fix or ()),
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        method=method,
        effort=effort,
        sensitivity=parse_sensitivity(sensitivity),
        is_fused=fuse,
        latency_tokens=latency_tokens,
        points=points,
    )
    parse_method(method, effort=effort)
    if plot is not None:
        check_picture(plot)
    check_text_target(output)
    if calibration is None:
        raise CalibrationError("allocation measures layers on text: give --calibration FILE")
    text = CalibrationOptions(source=calibration, field=calibration_field, samples=samples, window=window, seed=seed)
    with progress_bar("measuring") as advance:
        found = allocate_model(
            load_original(model),
            options,
            text,
            tokenizer=find_tokenizer(model),
            progress=advance,
            tell=lambda note: error_console.print(note, style="dim", soft_wrap=True, markup=False),
        )
    _write(output, found, f"microscale allocate {model} --budget {budget} --formats {formats}", options.sensitivity)
    if plot is not None:
        _draw(plot, model, options.budget, options.sensitivity, found.solution)
    seconds = time.perf_counter() - started
    if as_json:
        print_json(_facts(output, found, options.sensitivity, seconds))
        return
    _tell(options.budget, found.table.layers, found.solution)
    for note in found.notes[1:]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(
        f"wrote {output} in {seconds:.1f} s; next: microscale quantize {model} --recipe {output} -o OUT",
        markup=False,
        soft_wrap=True,
    )


def _write(output: Path, found: FoundAllocation, origin: str, kind: Sensitivity) -> None:
    point, limit = found.solution.point, found.budget
    comments = [
        origin,
        f"{amount_text(point.cost, limit.unit)} of {limit.text};"
        f" summed sensitivity ({kind.value}) {point.sensitivity:.6g}",
    ]
    write_text_file(output, recipe_text(found.recipe, comments))


def _draw(path: Path, model: str, limit: Budget, kind: Sensitivity, solution: Solution) -> None:
    size = 1e6 if limit.unit is BudgetUnit.BYTES else 1.0
    allocation_plot(
        path,
        [(point.cost / size, point.sensitivity) for point in solution.front],
        {name: (point.cost / size, point.sensitivity) for name, point in solution.uniform.items()},
        (solution.point.cost / size, solution.point.sensitivity),
        across="megabytes of the whole model" if limit.unit is BudgetUnit.BYTES else _UNITS[limit.unit],
        up=f"summed sensitivity ({kind.value})",
        title=f"{model}: optimal allocation of formats",
    )


def _tell(limit: Budget, layers: tuple[AllocatedLayer, ...], solution: Solution) -> None:
    rows = [(f"{name} for all", point) for name, point in solution.uniform.items()]
    rows += [("", point) for point in solution.front]
    shown = sorted(rows, key=lambda row: row[1].cost)
    columns = [
        Column(title=_UNITS[limit.unit], is_number=True),
        Column(title="bits", is_number=True, drop=2),
        Column(title="sensitivity", is_number=True),
        Column(title="layers", drop=1),
    ]
    print_table("Pareto front, beside one format for all", columns, [_row(limit, name, p) for name, p in shown])
    roles = list(dict.fromkeys(layer.role for layer in layers))
    by_role: list[list[str]] = []
    for role in roles:
        counts: dict[str, int] = {}
        for layer in layers:
            if layer.role == role:
                word = solution.chosen[layer.name].text
                counts[word] = counts.get(word, 0) + 1
        by_role.append([role, _counts_text(counts)])
    print_table("Chosen, by role", [Column(title="role"), Column(title="layers")], by_role)
    console.print(point_text(solution.point, limit), markup=False, soft_wrap=True)


def point_text(point: FrontPoint, limit: Budget) -> str:
    """Return what a point of the front costs, and the layers of each candidate."""
    bits = "" if limit.unit is BudgetUnit.BITS else f" {point.bits_per_weight:.3f} bits per weight;"
    return (
        f"{amount_text(point.cost, limit.unit)} of {limit.text};{bits} summed sensitivity {point.sensitivity:.5g};"
        f" {_counts_text(point.counts)}"
    )


def point_facts(point: FrontPoint) -> dict[str, Any]:
    """Return a point of the front for machines."""
    return {
        "cost": point.cost,
        "bits_per_weight": point.bits_per_weight,
        "sensitivity": point.sensitivity,
        "layers": dict(point.counts),
    }


def _row(limit: Budget, name: str, point: FrontPoint) -> list[str]:
    cost = amount_text(point.cost, limit.unit)
    layers = name or _counts_text(point.counts)
    return [cost, f"{point.bits_per_weight:.3f}", f"{point.sensitivity:.5g}", layers]


def _counts_text(counts: Any) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _facts(output: Path, found: FoundAllocation, kind: Sensitivity, seconds: float) -> dict[str, Any]:
    solution, table, limit = found.solution, found.table, found.budget
    return {
        "recipe": str(output),
        "budget": {"amount": limit.amount, "unit": limit.unit.value},
        "sensitivity": kind.value,
        "result": point_facts(solution.point),
        "front": [point_facts(one) for one in solution.front],
        "uniform": {name: point_facts(one) for name, one in solution.uniform.items()},
        "layers": [_layer_facts(one, table, solution.chosen[one.name]) for one in table.layers],
        "notes": list(found.notes),
        "seconds": seconds,
    }


def _layer_facts(layer: AllocatedLayer, table: LayerTable, chosen: Candidate) -> dict[str, Any]:
    times = None if table.milliseconds is None else table.milliseconds[layer.name]
    return {
        "name": layer.name,
        "role": layer.role,
        "shape": list(layer.shape),
        "chosen": chosen.text,
        "method": table.methods[layer.name][table.candidates.index(chosen)],
        "candidates": {
            candidate.text: {
                "sensitivity": table.sensitivity[layer.name][place],
                "bytes": table.num_bytes[layer.name][place],
                "milliseconds": None if times is None else times[place],
            }
            for place, candidate in enumerate(table.candidates)
        },
    }
