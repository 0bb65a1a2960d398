"""``microscale explain``: which backend runs each layer of a checkpoint, and why not the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from microscale.cli.output import Column, JsonOption, console, print_json, print_table
from microscale.cli.parameters import job_command
from microscale.errors import counted
from microscale.jobs.small_options import ExplainOptions

if TYPE_CHECKING:
    from microscale.planning.explain import Explanation, LayerExplanation

_COLUMNS = (
    Column(title="layers", is_number=True),
    Column(title="weights"),
    Column(title="inputs"),
    Column(title="backend"),
    Column(title="layout", drop=1),
    Column(title="level", drop=2),
)


@job_command(ExplainOptions)
def explain(
    options: ExplainOptions,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer; else equal ones are counted.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show for every layer the formats asked for and executed, who runs it, and why not the other backends.

    What is described is a forward call of the model, as eval makes it; the last line says what generate does.

    Example: `microscale explain OUT --device cuda`
    """
    from microscale.jobs.explain import explain as explain_job

    found = explain_job(options)
    if as_json:
        print_json({"model": options.model, **found.as_json()})
        return
    _show(str(options.model), found, names=layers)


def _show(title: str, found: Explanation, *, names: bool) -> None:
    groups = [[layer] for layer in found.layers] if names else _groups(found.layers)
    columns = (Column(title="layer"), *_COLUMNS[1:]) if names else _COLUMNS
    rows = [[group[0].layer if names else str(len(group)), *_cells(group[0])] for group in groups]
    print_table(f"{title}: {found.device}, inputs {found.dtype}", columns, rows)
    if found.obstacle is not None:
        console.print(found.obstacle, markup=False, soft_wrap=True)
    for group in _groups(found.layers):
        for line in _lines(group):
            console.print(line, markup=False, soft_wrap=True)
    for line in _model_lines(found):
        console.print(line, markup=False, soft_wrap=True)


def _model_lines(found: Explanation) -> list[str]:
    """Return what is to be said of the whole model: what attention is rounded to, and which call this describes."""
    attention = [f"{found.attention}; simulated in floats"] if found.attention.titled else []
    if found.why_not_decoder is None:
        generates = "generate runs the model in the decoder runtime instead"
    else:
        generates = f"generate makes such calls too, not the decoder runtime: {found.why_not_decoder}"
    return [*attention, f"This is a forward call of the model, as eval makes it; {generates}"]


def _groups(layers: Sequence[LayerExplanation]) -> list[list[LayerExplanation]]:
    """Gather layers of which the same is to be said."""
    groups: dict[object, list[LayerExplanation]] = {}
    for layer in layers:
        groups.setdefault(dataclasses.replace(layer, layer="", shape=()), []).append(layer)
    return list(groups.values())


def _cells(layer: LayerExplanation) -> list[str]:
    executed = layer.executed
    return [executed.weights, executed.activations or "kept", layer.backend, layer.layout or "", layer.level or ""]


def _lines(group: Sequence[LayerExplanation]) -> list[str]:
    """Return what the table has no room for: the kernel, what was asked for otherwise, and all refusals."""
    first = group[0]
    which = first.layer if len(group) == 1 else f"{counted(len(group), 'layer')} such as {first.layer}"
    lines = [f"{which}: {first.kernel}"]
    if first.reason is not None:
        asked = f"weights {first.requested.weights}, inputs {first.requested.activations or 'kept'}"
        lines.append(f"  asked for {asked}: {first.reason}")
    lines += [f"  not {other.backend}: {other.reason}" for other in first.passed_over]
    return lines
