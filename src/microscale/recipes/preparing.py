"""What happens to a decoder layer before it is rounded: inputs measured, scales folded, transforms and segments found,
and what is learned from the layer's outputs.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microscale.algorithms.contract import (
    BlockProblem,
    BlockStep,
    FoldStep,
    GroupProblem,
    LayerFunction,
    Progress,
    SegmentStep,
    TransformStep,
    as_it_is,
)
from microscale.algorithms.pipeline import Pipeline
from microscale.calibration.statistics import InputStatistics, Wanted
from microscale.errors import counted
from microscale.families.structure import BlockStructure, LinearGroup
from microscale.layerwise.blocks import BlockRunner, replaced_forward
from microscale.layerwise.measuring import measure_inputs
from microscale.nn.experts import ExpertTokens, computing
from microscale.recipes.calibration import ChannelOrder
from microscale.recipes.folding import fold_scale, shared_scale
from microscale.recipes.problem_book import ProblemBook
from microscale.recipes.problems import fold_first_scale, fold_segment_order, knows_inputs, transformed, with_inputs
from microscale.recipes.token_counts import TokenCounts
from microscale.transforms import AtRunTime, scale_transform


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActiveBlock:
    """One decoder layer at work: its inputs, and what the unquantized model makes of them where that is wanted.

    Without a runner the layer's inputs play no part.
    """

    index: int
    structure: BlockStructure
    runner: BlockRunner | None
    hidden: Sequence[Tensor]
    targets: Sequence[Tensor]


class Preparer:
    """Runs the steps of pipelines on decoder layers; what they find goes into the book or is folded into the model."""

    def __init__(
        self,
        model: nn.Module,
        book: ProblemBook,
        progress: Progress,
        seed: int,
        order: ChannelOrder,
        at_run_time: AtRunTime = AtRunTime.ONLINE,
        experts: ExpertTokens = ExpertTokens.ROUTED,
    ) -> None:
        self._model = model
        self._book = book
        self._progress = progress
        self._seed = seed
        self._order = order
        self._at_run_time = at_run_time
        self._experts = experts
        self.counts = TokenCounts(model)
        self._online: dict[str, list[str]] = {}
        self._unscaled: dict[str, list[str]] = {}
        self._placeless: dict[str, list[str]] = {}

    @property
    def notes(self) -> list[str]:
        """What a user should know of scales that found no place before a layer, or that were left out."""
        lines = (
            (
                "{} leaves {} as before, e.g. {}: nothing before takes scales, and the layout has no place",
                self._placeless,
            ),
            ("{} keeps its scales online for {}, e.g. {}: nothing before them takes these exactly", self._online),
            ("{} leaves {} as before, e.g. {}: experts read one norm, and no scale suits all of them", self._unscaled),
        )
        return [
            line.format(step, counted(len(names), "layer"), names[0])
            for line, found in lines
            for step, names in found.items()
        ]

    def find(self, block: ActiveBlock, pipeline: Pipeline) -> None:
        """Fold scales, find transforms, cut segments: all that follows from a layer's inputs alone."""
        for step in pipeline.of_kind(FoldStep):
            self._fold(block, step, pipeline)
        for step in pipeline.of_kind(TransformStep):
            for _, problem in self._measured(block, pipeline, step.wanted):
                self._book.keep(
                    transformed(problem, step.transforms(problem)) if knows_inputs(problem, step) else problem
                )
        for step in pipeline.of_kind(SegmentStep):
            self._segment(block, step, pipeline)

    def learn(self, block: ActiveBlock, pipeline: Pipeline) -> None:
        """Run the steps that learn from the layer's outputs."""
        for step in pipeline.of_kind(BlockStep):
            self._learn(block, step, pipeline)

    def measure(
        self, block: ActiveBlock, groups: Sequence[LinearGroup], wanted: Sequence[Wanted | None]
    ) -> dict[str, InputStatistics]:
        """Measure the inputs of groups, by the name of each group's first layer; nothing where nothing is wanted, or
        where too few tokens came by.
        """
        asked = [what for what in wanted if what is not None]
        runner = block.runner
        if not asked or not groups or runner is None:
            return {}
        asking = {f"{block.structure.name}.{group.linears[0]}": group for group in groups}
        with computing(self._experts):
            found = measure_inputs(
                runner,
                block.index,
                {name: self._model.get_submodule(name) for name in asking},
                block.hidden,
                wanted=functools.reduce(operator.or_, asked),
                seed=self._seed,
            )
        kept = {name: self.counts.enough(name, asking[name].role, each) for name, each in found.items()}
        return {asking[name].linears[0]: each for name, each in kept.items() if each is not None}

    def _measured(
        self, block: ActiveBlock, pipeline: Pipeline, wanted: Wanted | None
    ) -> list[tuple[LinearGroup, GroupProblem]]:
        """Return the groups of a pipeline with what is wanted of their inputs, the layers included."""
        pairs = self._book.groups(block.structure, pipeline)
        found = self.measure(block, [group for group, _ in pairs], [wanted])
        return [(group, with_inputs(problem, found.get(group.linears[0]))) for group, problem in pairs]

    def _fold(self, block: ActiveBlock, step: FoldStep, pipeline: Pipeline) -> None:
        """Scale the inputs of every group: folded where that is exact, else kept online."""
        shared = Counter(group.fold.name for group in block.structure.groups if group.fold is not None)
        for group, problem in self._measured(block, pipeline, step.wanted):
            fold, names = group.fold, [layer.name for layer in problem.layers]
            if not knows_inputs(problem, step):
                continue  # no token came by
            if fold is not None and shared[fold.name] > 1:
                self._unscaled.setdefault(step.name, []).extend(names)
                continue
            is_online = fold is None or bool(problem.layers[0].transforms) or len(problem.layers) < len(group.linears)
            share = as_it_is if fold is None or is_online else functools.partial(shared_scale, fold)
            scale = step.input_scale(dataclasses.replace(problem, share=share))
            if bool((scale == 1).all()):
                continue  # nothing to fold, nothing to keep
            if is_online and self._at_run_time is AtRunTime.FOLDED:
                self._placeless.setdefault(step.name, []).extend(names)
                continue
            if fold is None or is_online:
                self._online.setdefault(step.name, []).extend(names)
                self._book.keep(transformed(problem, [scale_transform(1.0 / scale)]))
                continue
            fold_scale(self._model, block.structure, group, shared_scale(fold, scale))
            self._book.refresh(block.structure)

    def _segment(self, block: ActiveBlock, step: SegmentStep, pipeline: Pipeline) -> None:
        """Cut segments; the order of their channels is folded where that is exact, else kept online.

        Groups come in the order of execution: what an order is folded into has its own segments by then.
        """
        for group, problem in self._measured(block, pipeline, step.wanted):
            if not knows_inputs(problem, step):
                self._book.keep(problem)
                continue
            cut = step.segmented(problem)
            if self._order is ChannelOrder.FOLDED:
                cut = fold_segment_order(self._model, block.structure, group, cut)
            self._book.keep(cut)
            self._book.refresh(block.structure)

    def _learn(self, block: ActiveBlock, step: BlockStep, pipeline: Pipeline) -> None:
        pairs = self._measured(block, pipeline, step.wanted)
        groups = tuple(found for _, found in pairs)

        runner = block.runner
        assert runner is not None

        def forward(stand_ins: Mapping[str, LayerFunction], batch: int) -> Tensor:
            with replaced_forward(stand_ins, self._model):
                return runner.run(block.index, block.hidden[batch], batch=batch)

        problem = BlockProblem(
            groups=groups,
            forward=forward,
            targets=block.targets,
            biases=self._book.biases(groups),
            seed=self._seed,
            progress=self._progress,
        )
        with torch.enable_grad():
            learned = step.learn(problem)
        shared = Counter(group.fold.name for group in block.structure.groups if group.fold is not None)
        for (group, _), found in zip(pairs, learned, strict=True):
            is_alone = group.fold is not None and shared[group.fold.name] == 1
            self._book.keep(fold_first_scale(self._model, block.structure, group, found) if is_alone else found)
