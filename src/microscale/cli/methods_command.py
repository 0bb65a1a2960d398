"""``microscale methods``: every method, its steps and their options."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from microscale.cli.output import JsonOption, SeedOption, command, print_json, print_wrapped_table


@command
def methods(
    name: Annotated[str | None, typer.Argument(help="A method or a chain, to see it in full.")] = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """List methods and steps: a method is a chain of steps, `step:option=value+step`.

    Examples: `microscale methods`, `microscale methods hadamard:size=64+gptq`
    """
    from microscale.algorithms.pipeline import parse_method
    from microscale.algorithms.registry import BEST, EFFORTS, METHODS, STEPS

    del seed
    chains = {word: parse_method(word).text for word in METHODS}
    chains |= {f"{BEST} --effort {effort}": parse_method(BEST, effort=effort).text for effort in EFFORTS}
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
    needs = {word: "yes" if parse_method(chain).needs_calibration else "no" for word, chain in chains.items()}
    print_wrapped_table(
        ("method", "chain of steps", "needs text"), [(word, chain, needs[word]) for word, chain in chains.items()]
    )
    if name is not None:
        return
    rows = [
        (
            str(step["name"]),
            ", ".join(f"{key}={value}" for key, value in step["options"].items()),
            str(step["summary"]),
            str(step["source"]),
        )
        for step in steps
    ]
    print_wrapped_table(("step", "options and defaults", "what it does", "source"), rows)
