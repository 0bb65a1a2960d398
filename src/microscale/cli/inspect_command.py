"""``microscale inspect``: what a checkpoint holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from microscale.cli.output import Column, JsonOption, SeedOption, console, print_json, print_table
from microscale.cli.parameters import job_command
from microscale.errors import counted
from microscale.jobs.small_options import InspectOptions

if TYPE_CHECKING:
    from microscale.planning.inspection import LayerFacts

_COLUMNS = (
    Column(title="layer"),
    Column(title="count", is_number=True, drop=3),
    Column(title="shape", drop=2),
    Column(title="format"),
    Column(title="activations"),
    Column(title="method", drop=4),
    Column(title="bits", is_number=True),
    Column(title="size", is_number=True, drop=1),
)


@job_command(InspectOptions)
def inspect(
    options: InspectOptions,
    show_all: Annotated[bool, typer.Option("--all", help="List the tensors that are not quantized, too.")] = False,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """Show formats, sizes and rules of a checkpoint, layer by layer.

    Example: `microscale inspect OUT`
    """
    from microscale.jobs.inspect import inspect as inspect_job
    from microscale.nn.sizes import size_text

    found = inspect_job(options)
    if as_json:
        print_json(found)
        return
    shown = found.quantized if found.quantized and not show_all else (*found.quantized, *found.others)
    rows = [_cells(name, layers) for name, layers in group_layers(shown).items()]
    print_table(f"{options.path}: layout {found.layout}", _COLUMNS, rows)
    for name, count in Counter(_without_columns(layer.format) for layer in found.quantized).items():
        console.print(f"{counted(count, 'layer')} in {name}{_rule_text(name)}", markup=False)
    for words, count in Counter(layer.online for layer in found.quantized if layer.online).items():
        console.print(f"at run time {counted(count, 'layer')} also: {words}", markup=False)
    others = sum(layer.num_bytes for layer in found.others)
    console.print(f"{counted(len(found.others), 'tensor')} not quantized, {size_text(others)}")
    if found.quantized:
        console.print(f"{found.bits_per_quantized_weight:.3f} bits per quantized weight")
    for side, word in found.attention.titled.items():
        console.print(f"{side} in {word}, simulated in floats", markup=False)
    console.print(found.size_words(), markup=False, soft_wrap=True)


def group_layers(layers: Sequence[LayerFacts]) -> dict[str, list[LayerFacts]]:
    """Gather layers that differ only by the numbers in their names, as in ``layers.{0-8}.mlp.up_proj``."""
    groups: dict[tuple[object, ...], list[LayerFacts]] = {}
    for layer in layers:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "#", layer.name)
        key = (pattern, layer.shape, layer.format, layer.activations, layer.method, layer.online, layer.num_bytes)
        groups.setdefault(key, []).append(layer)
    return {_group_name([layer.name for layer in members]): members for members in groups.values()}


def group_names(names: Sequence[str]) -> list[str]:
    """Return short names for layers that differ only by the numbers in their names."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name), []).append(name)
    return [_group_name(members) for members in groups.values()]


def _group_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    pieces = [re.findall(r"(?<=\.)\d+(?=\.|$)", name) for name in names]
    places = iter(sorted({int(piece[position]) for piece in pieces}) for position in range(len(pieces[0])))
    return re.sub(r"(?<=\.)\d+(?=\.|$)", lambda _: _ranges(next(places)), names[0])


def _ranges(numbers: Sequence[int]) -> str:
    """Return ``5`` or ``{0-3,7}``."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "}"


def _cells(name: str, layers: Sequence[LayerFacts]) -> list[str]:
    from microscale.nn.sizes import size_text

    first = layers[0]
    return [
        name,
        str(len(layers)),
        "x".join(str(length) for length in first.shape),
        first.format,
        first.activations or "",
        first.method or "",
        f"{first.bits_per_weight:.3f}" if first.num_weights else "",
        f"tied to {first.tied_to}" if first.tied_to else size_text(sum(layer.num_bytes for layer in layers)),
    ]


def _without_columns(name: str) -> str:
    from microscale.formats import parse_format
    from microscale.jobs.words import format_word

    return format_word(parse_format(name)) if name.startswith("segments(") else name


def _rule_text(name: str) -> str:
    from microscale.formats import BlockFormat, parse_format

    if name.startswith("segments of"):
        return ""
    fmt = parse_format(name)
    if not isinstance(fmt, BlockFormat):
        return ""
    return f": scale rule {fmt.rule}, rounding {fmt.rounding.value}, {fmt.nan_policy.value}"
