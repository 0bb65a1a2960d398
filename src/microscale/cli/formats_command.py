"""``microscale formats``: the named formats, or one of them explained."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from microscale.cli.output import Column, JsonOption, SeedOption, command, console, print_json, print_table

_DROP = {"summary": 4, "title": 5, "block": 1, "scale": 2}


@command
def formats(
    name: Annotated[str | None, typer.Argument(help="A format's name or spec; without it, all named ones.")] = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """List the named formats, or explain one with its value grid drawn.

    Examples: `microscale formats`, `microscale formats mxfp4_plus`, `microscale formats e3m2/32:e8m0:rceil`
    """
    if name is None:
        _list_formats(as_json)
    else:
        _explain(name, as_json)


def _list_formats(as_json: bool) -> None:
    from microscale.formats import ALIASES
    from microscale.report.explain import formats_table_rows

    rows = formats_table_rows()
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
        return
    fields = [field.name for field in dataclasses.fields(rows[0])]
    columns = [Column(title=name.replace("_", " "), drop=_DROP.get(name, 0)) for name in fields]
    print_table("Named formats", columns, [[str(getattr(row, name)) for name in fields] for row in rows])
    console.print(f"aliases: {', '.join(f'{alias} = {name}' for alias, name in ALIASES.items())}")
    console.print(
        "any other: ELEMENT/BLOCK:SCALE[:OPTION…], see docs/reference/formats.md; one in full: microscale formats NAME"
    )


def _explain(name: str, as_json: bool) -> None:
    from microscale.formats import format_name, parse_format, spec_text
    from microscale.report.explain import explain_format
    from microscale.report.grids import value_grid_text

    fmt = parse_format(name)
    facts = explain_format(fmt)
    if as_json:
        facts_by_label = dict(facts)
        print_json(
            {
                "name": format_name(fmt),
                "spec": spec_text(fmt),
                "bits_per_value": fmt.bits_per_value(),
                "facts": facts_by_label,
            }
        )
        return
    width = max(len(label) for label, _ in facts)
    for label, text in facts:
        console.print(f"[bold]{label:<{width}}[/bold]  ", end="")
        console.print(text, markup=False, soft_wrap=True)
    console.print()
    console.print(value_grid_text(fmt, width=min(100, console.width)), markup=False, soft_wrap=True)
