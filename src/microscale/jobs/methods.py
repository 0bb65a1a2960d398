"""List the methods with the chains that they stand for, and the steps that chains are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from microscale.algorithms.contract import Step
from microscale.algorithms.pipeline import Pipeline, read_method
from microscale.algorithms.registry import BEST, EFFORTS, METHODS, STEPS
from microscale.formats import parse_activation, parse_format
from microscale.jobs.reporting import SILENT, Reporter
from microscale.jobs.small_options import MethodsOptions
from microscale.transforms import AtRunTime


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedChain:
    """A method's name, its chain of steps, whether it learns from text, and what opens its files."""

    name: str
    chain: str
    needs_calibration: bool
    opens_in: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """A step: its options with their defaults, what it does, and where that was published."""

    name: str
    options: Mapping[str, Any]
    summary: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodsResult:
    """The methods that were asked for, and all steps."""

    methods: tuple[NamedChain, ...]
    steps: tuple[StepFacts, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the chains by name, and the steps."""
        return {
            "methods": {one.name: one.chain for one in self.methods},
            "steps": [dataclasses.asdict(step) for step in self.steps],
        }


def methods(options: MethodsOptions, reporter: Reporter = SILENT) -> MethodsResult:
    """List every method with its chain, or one in full, and every step with its options.

    Raises:
        RecipeError: a name that is neither a method nor a chain of steps.
    """
    del reporter  # it takes no time
    if options.name is None:
        found = [_chain(name, name) for name in METHODS]
        found += [_chain(f"{BEST} --effort {effort}", BEST, effort) for effort in EFFORTS]
        found += [
            _chain(f"{BEST} --effort {effort} --layout compressed-tensors", BEST, effort, AtRunTime.FOLDED)
            for effort in EFFORTS
        ]
    else:
        found = [_chain(options.name, options.name)]
    return MethodsResult(methods=tuple(found), steps=tuple(_facts(name, step) for name, step in STEPS.items()))


def _chain(name: str, method: str, effort: str = "fast", at_run_time: AtRunTime = AtRunTime.ONLINE) -> NamedChain:
    chain = read_method(method).pipeline(effort=effort, at_run_time=at_run_time)
    return NamedChain(name=name, chain=chain.text, needs_calibration=chain.needs_calibration, opens_in=_opens_in(chain))


EVERYWHERE = "transformers, vLLM, microscale"
HERE = "microscale"


def _opens_in(chain: Pipeline) -> str:
    """Return what opens a model in MXFP4 that a chain made, in the layout that suits it."""
    if chain.is_online:
        return HERE
    inputs = parse_activation("mxfp4:even")
    _, changed = chain.adapt(parse_format("mxfp4"), inputs)
    return EVERYWHERE if changed == inputs else f"weights alone: {EVERYWHERE}; inputs too: {HERE}"


def _facts(name: str, step: type[Step]) -> StepFacts:
    return StepFacts(
        name=name,
        options={field.name: field.default for field in dataclasses.fields(step)},
        summary=(step.__doc__ or "").strip().split("\n")[0],
        source=step.source,
    )
