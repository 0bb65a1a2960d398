"""What is known so far of each layer to quantize: formats, transforms, learned weights, until it is rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from microscale.algorithms.contract import GroupProblem, LayerProblem
from microscale.algorithms.pipeline import Pipeline
from microscale.families.structure import BlockStructure, LinearGroup
from microscale.nn.modules import float_weight
from microscale.recipes.matrices import parameter_of
from microscale.recipes.plan import PlannedLayer
from microscale.recipes.problems import is_scaled_at_most, layer_problem


class ProblemBook:
    """The problems of the planned layers of a model, each with its own pipeline.

    Layers of one group that have different pipelines are groups of their own.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, PlannedLayer], pipelines: Mapping[str, Pipeline]) -> None:
        self.layers = layers
        self.pipelines = pipelines
        self._model = model
        self._tasks: dict[str, LayerProblem] = {}

    @property
    def distinct(self) -> tuple[Pipeline, ...]:
        """The pipelines, each once."""
        return tuple({pipeline.text: pipeline for pipeline in self.pipelines.values()}.values())

    def problem(self, name: str) -> LayerProblem:
        """Return a layer as it was kept last, or as the plan has it."""
        found = self._tasks.get(name)
        if found is not None:
            return found
        return layer_problem(self.layers[name], self._model.get_submodule(name))

    def groups(self, block: BlockStructure, pipeline: Pipeline) -> list[tuple[LinearGroup, GroupProblem]]:
        """Return the groups of a block with those of their layers that have the pipeline."""
        found: list[tuple[LinearGroup, GroupProblem]] = []
        for group in block.groups:
            names = [f"{block.name}.{name}" for name in group.linears]
            problems = [self.problem(name) for name in names if self.pipelines.get(name) is pipeline]
            if problems:
                is_folded = (
                    bool(group.sources) and len(problems) == len(names) and all(map(is_scaled_at_most, problems))
                )
                found.append((group, GroupProblem(role=group.role, layers=tuple(problems), is_order_folded=is_folded)))
        return found

    def chosen(self, block: BlockStructure, group: LinearGroup) -> list[str]:
        """Return the full names of a group's layers that are to be quantized."""
        names = (f"{block.name}.{name}" for name in group.linears)
        return [name for name in names if name in self.layers]

    def keep(self, group: GroupProblem) -> None:
        """Keep the layers of a group, without what was measured of their inputs."""
        self._tasks.update({layer.name: dataclasses.replace(layer, inputs=None) for layer in group.layers})

    def drop(self, name: str) -> None:
        """Forget a layer that is rounded."""
        self._tasks.pop(name, None)

    def refresh(self, block: BlockStructure) -> None:
        """Take the weights of kept problems from the model again: a fold may have changed rows of a layer before."""
        names = [f"{block.name}.{name}" for group in block.groups for name in group.linears]
        for name in names:
            if name in self._tasks:
                weight = float_weight(self._model.get_submodule(name))
                self._tasks[name] = dataclasses.replace(self._tasks[name], weight=weight)

    def biases(self, groups: Sequence[GroupProblem]) -> dict[str, Tensor | None]:
        """Return the biases of the layers of groups."""
        names = [layer.name for group in groups for layer in group.layers]
        return {name: parameter_of(self._model.get_submodule(name), "bias") for name in names}
