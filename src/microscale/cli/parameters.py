"""From a record of options to the parameters of a command, and from what was typed back to the record."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import MISSING
from typing import Annotated, Any, TypeVar

import typer

from microscale.cli.output import JsonOption, command, print_json, tell_missing_kernels
from microscale.cli.reporter import ConsoleReporter
from microscale.integrations.remote_code import trusting
from microscale.jobs.option import NamedOption, Options, Place, is_texts, kinds_of, options_of, record_from

O = TypeVar("O", bound=Options)  # noqa: E741


def parameters_of(record: type[Options]) -> list[inspect.Parameter]:
    """Return the parameters of a typer command, one for each option of a record that the command line has."""
    return [_parameter(one) for one in options_of(record) if one.option.place is not Place.PYTHON]


def _parameter(one: NamedOption) -> inspect.Parameter:
    option, default = one.option, one.default
    kind = option.command_type or one.type
    if any(is_texts(member) for member in kinds_of(kind)):
        kind, default = list[str] | None, None
    if option.place is Place.ARGUMENT:
        info: Any = typer.Argument(help=option.help)
    else:
        flags = (one.flag,) if option.short is None else (one.flag, option.short)
        info = typer.Option(*flags, help=option.help, min=option.minimum, max=option.maximum)
    if option.place is Place.REQUIRED:
        default = MISSING
        kind = next(member for member in kinds_of(kind) if member is not type(None))
    return inspect.Parameter(
        one.word,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[kind, info],
    )


def job_command(record: type[O]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function whose first parameter is a record of options.

    The command takes the record's options and the function's other parameters, and hands the filled record over. What
    has a seed draws by it.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        mine = parameters_of(record)
        others = list(inspect.signature(body, eval_str=True).parameters.values())[1:]

        def run(**given: Any) -> None:
            words = {one.name: given[one.name] for one in mine}
            words = {name: value for name, value in words.items() if value is not None}
            options = record_from(record, words)
            if "seed" in given:
                importlib.import_module("torch").manual_seed(given["seed"])
            with trusting(getattr(options, "trust_remote_code", False)):
                body(options, **{one.name: given[one.name] for one in others})

        parameters = [*mine, *(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in others)]
        run.__name__, run.__doc__ = body.__name__, body.__doc__
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return command(run)

    return decorate


def result_command(record: type[O]) -> Callable[[Callable[[Any, O], None]], Callable[..., None]]:
    """Make a command of a function that prints the result of the job of its name; ``--json`` prints the result as JSON.

    The job gets the record of options, and bars and notes go to standard error.
    """

    def decorate(show: Callable[[Any, O], None]) -> Callable[..., None]:
        def run(options: Any, as_json: JsonOption = False) -> None:
            job = getattr(importlib.import_module(f"microscale.jobs.{show.__name__}"), show.__name__)
            tell_missing_kernels()
            result = job(options, ConsoleReporter())
            if as_json:
                print_json(result)
            else:
                show(result, options)

        run.__name__, run.__doc__ = show.__name__, show.__doc__
        return job_command(record)(run)

    return decorate
