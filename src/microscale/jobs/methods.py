"""List the methods with the chains that they stand for, and the steps that chains are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from microscale.algorithms.contract import Step
from microscale.algorithms.pipeline import Pipeline, read_method
from microscale.algorithms.registry import BEST, EFFORTS, METHODS, STEPS
from microscale.checkpoint.compressed_tensors import CompressedTensorsLayout
from microscale.formats import ActivationSpec, parse_activation, parse_format
from microscale.jobs.reporting import SILENT, Reporter
from microscale.jobs.small_options import MethodsOptions
from microscale.layer_spec import LayerSpec
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
    """The methods that were asked for, the efforts of ``best`` under the layouts of other tools, and all steps."""

    methods: tuple[NamedChain, ...]
    folded: tuple[NamedChain, ...]
    steps: tuple[StepFacts, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the chains by name, and the steps."""
        return {
            "methods": {one.name: one.chain for one in self.methods},
            "best_folded": {one.name: one.chain for one in self.folded},
            "opens_in": {one.name: one.opens_in for one in self.methods},
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
    else:
        found = [_chain(options.name, options.name)]
    folded = [] if options.name is not None else [_chain(effort, BEST, effort, AtRunTime.FOLDED) for effort in EFFORTS]
    return MethodsResult(
        methods=tuple(found), folded=tuple(folded), steps=tuple(_facts(name, step) for name, step in STEPS.items())
    )


def _chain(name: str, method: str, effort: str = "fast", at_run_time: AtRunTime = AtRunTime.ONLINE) -> NamedChain:
    chain = read_method(method).pipeline(effort=effort, at_run_time=at_run_time)
    return NamedChain(name=name, chain=chain.text, needs_calibration=chain.needs_calibration, opens_in=_opens_in(chain))


HERE = "microscale"
ENGINES = "transformers, vLLM"


def _opens_in(chain: Pipeline) -> str:
    """Return what opens a model in MXFP4 that a chain made, in the layout that suits it; ours opens all."""
    if chain.is_online:
        return HERE
    is_held = {inputs: _is_held(chain, inputs) for inputs in (None, parse_activation("mxfp4:even"))}
    if all(is_held.values()):
        return ENGINES
    return f"{ENGINES} (weights alone)" if is_held[None] else HERE


def _is_held(chain: Pipeline, inputs: ActivationSpec | None) -> bool:
    """Whether the layout of compressed-tensors holds a layer whose formats a chain has changed."""
    fmt, changed = chain.adapt(parse_format("mxfp4"), inputs)
    layer = LayerSpec(
        name="layer", format=fmt, shape=(32, 32), dtype=torch.bfloat16, activations=changed, method=chain.text
    )
    return CompressedTensorsLayout().refusal(layer) is None


def _facts(name: str, step: type[Step]) -> StepFacts:
    return StepFacts(
        name=name,
        options={field.name: field.default for field in dataclasses.fields(step)},
        summary=(step.__doc__ or "").strip().split("\n")[0],
        source=step.source,
    )
