"""``microscale methods``: every method, its steps and their options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microscale.cli.output import JsonOption, SeedOption, print_json, print_wrapped_table
from microscale.cli.parameters import job_command
from microscale.jobs.small_options import MethodsOptions

if TYPE_CHECKING:
    from microscale.jobs.methods import NamedChain


EFFORT = "best --effort "


@job_command(MethodsOptions)
def methods(options: MethodsOptions, as_json: JsonOption = False, seed: SeedOption = 0) -> None:
    """List methods and steps: a method is a chain of steps, `step:option=value+step`.

    Examples: `microscale methods`, `microscale methods hadamard:size=64+gptq`
    """
    from microscale.jobs.methods import methods as methods_job

    found = methods_job(options)
    if as_json:
        print_json(found)
        return
    headings = ("chain of steps", "needs text", "opens in")
    efforts = [one for one in found.methods if one.name.startswith(EFFORT)]
    named = [one for one in found.methods if one not in efforts]
    print_wrapped_table(("method", *headings), [_row(one) for one in named])
    if options.name is not None:
        return
    print_wrapped_table((EFFORT.strip(), *headings), [_row(one) for one in efforts])
    print_wrapped_table(("best --layout compressed-tensors --effort", *headings), [_row(one) for one in found.folded])
    rows = [
        (step.name, ", ".join(f"{key}={value}" for key, value in step.options.items()), step.summary, step.source)
        for step in found.steps
    ]
    print_wrapped_table(("step", "options and defaults", "what it does", "source"), rows)


def _row(one: NamedChain) -> tuple[str, str, str, str]:
    return one.name.removeprefix(EFFORT), one.chain, "yes" if one.needs_calibration else "no", one.opens_in
