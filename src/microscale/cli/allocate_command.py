"""``microscale allocate``: the best format for every layer under a budget, as a recipe."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from microscale.algorithms import parse_method
from microscale.calibration.texts import DEFAULT_FIELD
from microscale.checkpoint import write_text_file
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
from microscale.families import describe
from microscale.planning import (
    AllocatedLayer,
    Budget,
    BudgetUnit,
    Candidate,
    FrontPoint,
    LayerTable,
    MeasuringCost,
    Sensitivity,
    Solution,
    allocated_layers,
    allocation_recipe,
    amount_text,
    check_budget,
    measure_table,
    measuring_cost,
    parse_budget,
    parse_candidates,
    parse_fixed,
    parse_sensitivity,
    solve,
)
from microscale.planning.stand_ins import measured_method, needs_text
from microscale.recipes import recipe_text, unstack_experts
from microscale.report import allocation_plot, check_picture

DEFAULT_FORMATS = "mxfp4,mxfp4_plus,nvfp4,mxfp6_e2m3,mxfp8"
DEFAULT_SAMPLES, DEFAULT_WINDOW = 8, 512
METHOD_WINDOWS = 64
_UNITS = {BudgetUnit.BITS: "bits per weight", BudgetUnit.BYTES: "bytes", BudgetUnit.MILLISECONDS: "milliseconds"}


@command
def allocate(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a transformers causal language model.")],
    budget: Annotated[str, typer.Option("--budget", "-b", help="4.5bits, 1.2GB (whole model) or 20ms.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write, as YAML.")],
    formats: Annotated[
        str, typer.Option("--formats", "-f", help="Candidates WEIGHTS[/ACTIVATIONS] with commas; none leaves alone.")
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
    from microscale.integrations.calibration import find_tokenizer, read_windows
    from microscale.integrations.loading import load_original

    tell_missing_kernels()
    started = time.perf_counter()
    limit, kind = parse_budget(budget), parse_sensitivity(sensitivity)
    candidates = parse_candidates(formats)
    fixed = [parse_fixed(text) for text in fix or []]
    parse_method(method, effort=effort)
    if plot is not None:
        check_picture(plot)
    if calibration is None:
        raise CalibrationError("allocation measures layers on text: give --calibration FILE")
    original: Any = load_original(model)
    unstack_experts(original)
    layers, every = allocated_layers(
        original, candidates, fixed=fixed, include=include or (), exclude=exclude or (), is_fused=fuse
    )
    check_budget(original, layers, every, limit)
    tokenizer = find_tokenizer(model)
    options: dict[str, Any] = {"window": window, "seed": seed, "field": calibration_field, "feed": "original"}
    given = read_windows(calibration, tokenizer, original, samples=samples, **options)
    taught = None
    if needs_text(method, effort):
        taught = _method_text(calibration, tokenizer, original, samples, options)
    cost = measuring_cost(kind, len(layers), len(every), len(describe(original).blocks), samples * window)
    notes = _notes(cost, kind, len(layers), len(every), method, effort)
    error_console.print(notes[0], style="dim", soft_wrap=True, markup=False)
    with progress_bar("measuring") as advance:
        table = measure_table(
            original,
            layers,
            every,
            calibration=given,
            method_text=taught,
            sensitivity=kind,
            method=method,
            effort=effort,
            latency_tokens=latency_tokens if limit.unit is BudgetUnit.MILLISECONDS else None,
            progress=advance,
        )
    solution = solve(table, limit, points=points)
    recipe = allocation_recipe(original, layers, solution.chosen, method=method, effort=effort)
    comments = [
        f"microscale allocate {model} --budget {budget} --formats {formats}",
        f"{amount_text(solution.point.cost, limit.unit)} of {limit.text};"
        f" summed sensitivity ({kind.value}) {solution.point.sensitivity:.6g}",
    ]
    write_text_file(output, recipe_text(recipe, comments))
    if plot is not None:
        _draw(plot, model, limit, kind, solution)
    seconds = time.perf_counter() - started
    if as_json:
        print_json(_facts(output, limit, kind, table, solution, notes, seconds))
        return
    _tell(limit, layers, solution)
    for note in notes[1:]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(
        f"wrote {output} in {seconds:.1f} s; next: microscale quantize {model} --recipe {output} -o OUT",
        markup=False,
        soft_wrap=True,
    )


def _notes(cost: MeasuringCost, kind: Sensitivity, layers: int, candidates: int, method: str, effort: str) -> list[str]:
    """Return what measuring takes, and what it cannot see."""
    notes = [
        f"sensitivity {kind.value}: {layers} layers in {candidates} candidates, the work of about"
        f" {cost.passes:.0f} passes over {cost.tokens} tokens"
    ]
    if measured_method(method, effort) == "rtn" and parse_method(method, effort=effort).text != "rtn":
        notes.append(f"method {method} ties layers together: sensitivity is that of plain rounding")
    return notes


def _method_text(calibration: str, tokenizer: Any, model: Any, samples: int, options: dict[str, Any]) -> Any:
    """Return windows for the method: more than sensitivity needs, or as many where the text is short."""
    from microscale.errors import TextError
    from microscale.integrations.calibration import read_windows

    try:
        return read_windows(calibration, tokenizer, model, samples=max(samples, METHOD_WINDOWS), **options)
    except TextError:
        return read_windows(calibration, tokenizer, model, samples=samples, **options)


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
    console.print(
        f"{amount_text(solution.point.cost, limit.unit)} of {limit.text};"
        f" {solution.point.bits_per_weight:.3f} bits per weight; summed sensitivity {solution.point.sensitivity:.5g}",
        markup=False,
    )


def _row(limit: Budget, name: str, point: FrontPoint) -> list[str]:
    cost = amount_text(point.cost, limit.unit)
    layers = name or _counts_text(point.counts)
    return [cost, f"{point.bits_per_weight:.3f}", f"{point.sensitivity:.5g}", layers]


def _counts_text(counts: Any) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _facts(
    output: Path,
    limit: Budget,
    kind: Sensitivity,
    table: LayerTable,
    solution: Solution,
    notes: list[str],
    seconds: float,
) -> dict[str, Any]:
    def point(one: FrontPoint) -> dict[str, Any]:
        return {
            "cost": one.cost,
            "bits_per_weight": one.bits_per_weight,
            "sensitivity": one.sensitivity,
            "layers": dict(one.counts),
        }

    def layer(one: AllocatedLayer) -> dict[str, Any]:
        chosen: Candidate = solution.chosen[one.name]
        times = None if table.milliseconds is None else table.milliseconds[one.name]
        return {
            "name": one.name,
            "role": one.role,
            "shape": list(one.shape),
            "chosen": chosen.text,
            "candidates": {
                candidate.text: {
                    "sensitivity": table.sensitivity[one.name][place],
                    "bytes": table.num_bytes[one.name][place],
                    "milliseconds": None if times is None else times[place],
                }
                for place, candidate in enumerate(table.candidates)
            },
        }

    return {
        "recipe": str(output),
        "budget": {"amount": limit.amount, "unit": limit.unit.value},
        "sensitivity": kind.value,
        "result": point(solution.point),
        "front": [point(one) for one in solution.front],
        "uniform": {name: point(one) for name, one in solution.uniform.items()},
        "layers": [layer(one) for one in table.layers],
        "notes": notes,
        "seconds": seconds,
    }
