"""``microscale methods``: every method, its steps and their options."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.table import Table

from microscale.algorithms import EFFORTS, METHODS, STEPS, parse_method
from microscale.cli.output import JsonOption, SeedOption, command, console, print_json


@command
def methods(
    name: Annotated[str | None, typer.Argument(help="A method or a chain, to see it in full.")] = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """List methods and steps: a method is a chain of steps, `step:option=value+step`.

    Examples: `microscale methods`, `microscale methods hadamard:size=64+gptq`
    """
    del seed
    chains = {word: parse_method(word).text for word in METHODS}
    chains |= {f"best --effort {effort}": parse_method("best", effort=effort).text for effort in EFFORTS}
    if name is not None:
        chains = {name: parse_method(name).text}
    steps: list[dict[str, Any]] = [
        {
            "name": word,
            "options": {field.name: field.default for field in dataclasses.fields(step)},
            "summary": (step.__doc__ or "").strip().split("\n")[0],
            "source": step.source,
        }
        for word, step in STEPS.items()
    ]
    if as_json:
        print_json({"methods": chains, "steps": steps})
        return
    table = Table("method", "chain of steps", "needs text")
    for word, chain in chains.items():
        table.add_row(word, chain, "yes" if parse_method(chain).needs_calibration else "no")
    console.print(table)
    if name is not None:
        return
    table = Table("step", "options and defaults", "what it does", "source")
    for step in steps:
        options = ", ".join(f"{key}={value}" for key, value in step["options"].items())
        table.add_row(str(step["name"]), options, str(step["summary"]), str(step["source"]))
    console.print(table)
