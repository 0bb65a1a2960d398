"""Quantize with calibration: one decoder layer after the other, on the inputs that the quantized ones before it give.

The order inside a layer: scales are folded, transforms found, what is learned from the layer's outputs is learned; then
group after group is measured, rounded and replaced, so that each group sees the rounding of those before it (where
layers are fed unquantized inputs, all groups are measured first). After every layer its result and the inputs of the
next can be stored, so that an interrupted job goes on there.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microscale.algorithms import (
    BlockProblem,
    BlockStep,
    FoldStep,
    GroupTask,
    LayerFunction,
    LayerTask,
    ModelProblem,
    ModelStep,
    Pipeline,
    Progress,
    RotationStep,
    SegmentStep,
    SideStep,
    TransformStep,
)
from microscale.calibration import ActivationStore, InputStatistics, Wanted
from microscale.families import BlockStructure, LinearGroup, ModelStructure
from microscale.nn import QuantizedLinear
from microscale.recipes.blocks import BlockRunner, float32_model, replaced_forward, to_float32
from microscale.recipes.calibration import Calibration
from microscale.recipes.folding import fold_scale, fuse_norms, shared_scale
from microscale.recipes.matrices import parameter_of
from microscale.recipes.measuring import measure_inputs
from microscale.recipes.offload import LayerLoader, layer_state, restore_layer
from microscale.recipes.plan import PlannedLayer, is_transposed
from microscale.recipes.refusals import refuse_whole, refuse_without_text
from microscale.recipes.rotating import rotate_model
from microscale.recipes.stream import Flow, LayerStream
from microscale.recipes.tasks import float_weight, fold_first_scale, is_seen, transformed, with_inputs
from microscale.transforms import scale_transform

Replace = Callable[[str, QuantizedLinear], None]
"""Puts a module in the place of the one with a name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """One decoder layer at work: its inputs, and what the unquantized model makes of them where that is wanted.

    Without a runner the layer's inputs play no part.
    """

    index: int
    structure: BlockStructure
    runner: BlockRunner | None
    hidden: Sequence[Tensor]
    targets: Sequence[Tensor]

    def full_name(self, name: str) -> str:
        """Return a linear layer's full name."""
        return f"{self.structure.name}.{name}"


class Quantizer:
    """Quantizes the planned linear layers of a model, each with its own pipeline; the model is changed in place.

    Layers of one group that have different pipelines are groups of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: ModelStructure,
        layers: Mapping[str, PlannedLayer],
        pipelines: Mapping[str, Pipeline],
        calibration: Calibration | None,
        progress: Progress,
        store: ActivationStore,
        loader: LayerLoader,
    ) -> None:
        self._model = model
        self._structure = structure
        self._layers = layers
        self._pipelines = pipelines
        self._calibration = calibration
        self._progress = progress
        self._store = store
        self._loader = loader
        self._dtypes: Mapping[str, torch.dtype] = {}
        self._tasks: dict[str, LayerTask] = {}

    def run(self, replace: Replace) -> list[str]:
        """Quantize every planned layer that lies in a decoder layer; returns their names.

        Raises:
            CalibrationError: a pipeline that needs calibration text where there is none, or the whole model where its
                layers come one by one.
        """
        blocks = self._structure.blocks
        names = [f"{block.name}.{name}" for block in blocks for group in block.groups for name in group.linears]
        if self._loader.is_partial:
            refuse_whole(self._distinct)
        with float32_model(self._model) as self._dtypes:
            rotations = [(step, p) for p in self._distinct for step in p.of_kind(RotationStep)]
            for step, pipeline in dict(rotations).items():  # the same one twice would be another one
                if step.is_learned:
                    fuse_norms(self._model, self._structure)
                model = self._model_problem(pipeline) if step.is_learned else None
                rotate_model(self._model, self._structure, step, model)
            for pipeline in self._distinct:
                for step in pipeline.of_kind(ModelStep):
                    self._learn_model(step, pipeline)
            self._stream(replace)
        return [name for name in names if name in self._layers]

    @property
    def _distinct(self) -> tuple[Pipeline, ...]:
        return tuple({pipeline.text: pipeline for pipeline in self._pipelines.values()}.values())

    @property
    def _settings(self) -> Calibration:
        if self._calibration is None:
            refuse_without_text(self._distinct)
        assert self._calibration is not None
        return self._calibration

    def _task(self, name: str) -> LayerTask:
        found = self._tasks.get(name)
        if found is not None:
            return found
        layer = self._layers[name]
        return LayerTask(
            name=name,
            weight=float_weight(self._model.get_submodule(name)),
            format=layer.format,
            activations=layer.activations,
            dtype=layer.dtype,
        )

    def _groups(self, block: BlockStructure, pipeline: Pipeline) -> list[tuple[LinearGroup, GroupTask]]:
        """Return the groups of a block with those of their layers that have the pipeline."""
        found: list[tuple[LinearGroup, GroupTask]] = []
        for group in block.groups:
            names = [f"{block.name}.{name}" for name in group.linears]
            tasks = [self._task(name) for name in names if self._pipelines.get(name) is pipeline]
            if tasks:
                found.append((group, GroupTask(role=group.role, layers=tuple(tasks))))
        return found

    def _keep(self, group: GroupTask) -> None:
        self._tasks.update({layer.name: dataclasses.replace(layer, inputs=None) for layer in group.layers})

    def _biases(self, groups: Sequence[GroupTask]) -> dict[str, Tensor | None]:
        names = [layer.name for group in groups for layer in group.layers]
        return {name: parameter_of(self._model.get_submodule(name), "bias") for name in names}

    def _learn_model(self, step: ModelStep, pipeline: Pipeline) -> None:
        """Run a step that sees the whole model; learned weights go into the model too."""
        problem = self._model_problem(pipeline)
        with torch.enable_grad():
            learned = step.learn(problem)
        for group in learned:
            self._keep(group)
            for layer in group.layers:
                module = self._model.get_submodule(layer.name)
                weight = module.get_parameter("weight")
                weight.data.copy_(layer.weight.T if is_transposed(module) else layer.weight)

    def _model_problem(self, pipeline: Pipeline) -> ModelProblem:
        """Return the whole model as a function of stand-ins for the layers of a pipeline."""
        settings = self._settings
        groups = tuple(group for block in self._structure.blocks for _, group in self._groups(block, pipeline))

        def logits(stand_ins: Mapping[str, LayerFunction], tokens: Tensor) -> Tensor:
            with replaced_forward(stand_ins, self._model):
                return self._model(input_ids=tokens, use_cache=False).logits

        return ModelProblem(
            groups=groups,
            logits=logits,
            windows=settings.windows.to(next(self._model.parameters()).device),
            biases=self._biases(groups),
            seed=settings.seed,
            progress=self._progress,
        )

    def _stream(self, replace: Replace) -> None:
        """Go through the decoder layers, from the first that no earlier run has finished."""
        blocks = self._structure.blocks
        is_streamed = any(pipeline.is_streamed for pipeline in self._distinct)
        first = self._restored()
        stream = self._open_stream(first) if is_streamed and first < len(blocks) else None
        for index in range(first, len(blocks)):
            self._progress(index, len(blocks), blocks[index].name)
            self._load(blocks[index].name)
            block = self._block(index, stream)
            self._prepare_block(block)
            self._round_block(block, replace)
            if stream is not None:
                stream.advance(index)
            self._finish(block, stream)
        self._progress(len(blocks), len(blocks), "")

    def _restored(self) -> int:
        """Take over the layers that an earlier run has finished; returns how many."""
        done = self._store.last_complete_layer() or 0
        for index in range(done):
            name = self._structure.blocks[index].name
            restore_layer(self._model, name, self._store.state(index), self._layers)
            self._loader.restored(name)
        return done

    def _open_stream(self, first: int) -> LayerStream:
        settings, blocks = self._settings, self._structure.blocks
        has_learning = any(pipeline.of_kind(BlockStep) for pipeline in self._distinct)
        is_tuple: bool | None = None
        if first:
            is_tuple = bool(self._store.arguments(0, 0)["is_tuple"])
        else:
            self._load(blocks[0].name)
        names = [block.name for block in blocks]
        runner = BlockRunner(self._model, names, settings.windows, batch=settings.batch, is_tuple=is_tuple)
        flow = Flow.EXACT
        if settings.is_sequential:
            flow = Flow.TARGETS if has_learning else Flow.QUANTIZED
        stream = LayerStream(runner, self._store, flow, len(blocks))
        if not first:
            self._store.put_arguments(0, 0, {"is_tuple": runner.is_tuple})
            self._store.finish_arguments()
            stream.start()
        return stream

    def _load(self, name: str) -> None:
        """See that a layer's weights are at hand, in float32."""
        self._loader.load(name)
        to_float32(self._model.get_submodule(name))

    def _block(self, index: int, stream: LayerStream | None) -> _Block:
        structure = self._structure.blocks[index]
        if stream is None:
            return _Block(index=index, structure=structure, runner=None, hidden=(), targets=())
        targets = stream.targets(index)
        return _Block(
            index=index, structure=structure, runner=stream.runner, hidden=stream.inputs(index), targets=targets
        )

    def _finish(self, block: _Block, stream: LayerStream | None) -> None:
        """Leave a layer behind: what is still float gets its dtype back, and the result is stored."""
        layer = self._model.get_submodule(block.structure.name)
        for module in layer.modules():
            if isinstance(module, QuantizedLinear):
                module.drop_cached_weight()
        for name, parameter in layer.named_parameters():
            parameter.data = parameter.data.to(self._dtypes.get(block.full_name(name), parameter.dtype))
        if self._store.path is not None:
            self._store.put_state(block.index, layer_state(layer))
        if stream is not None:
            stream.finish(block.index)
        else:
            self._store.finish_layer(block.index + 1)

    def _prepare_block(self, block: _Block) -> None:
        for pipeline in self._distinct:
            for step in pipeline.of_kind(FoldStep):
                self._fold(block, step, pipeline)
            for step in pipeline.of_kind(TransformStep):
                for _, task in self._measured(block, pipeline, step.wanted):
                    self._keep(transformed(task, step.transforms(task)) if is_seen(task, step) else task)
            for step in pipeline.of_kind(SegmentStep):
                for _, task in self._measured(block, pipeline, step.wanted):
                    self._keep(step.segmented(task) if is_seen(task, step) else task)
            for step in pipeline.of_kind(BlockStep):
                self._learn(block, step, pipeline)

    def _round_block(self, block: _Block, replace: Replace) -> None:
        groups = [group for group in block.structure.groups if self._chosen(block, group)]
        is_ahead = self._calibration is not None and not self._calibration.is_sequential
        ahead = self._measure(block, groups, [w for g in groups for w in self._wanted(block, g)]) if is_ahead else {}
        for group in groups:
            found = ahead if is_ahead else self._measure(block, [group], self._wanted(block, group))
            inputs = found.pop(group.linears[0], None)
            for name in self._chosen(block, group):
                module = self.rounded(dataclasses.replace(self._task(name), inputs=inputs))
                if block.runner is not None:
                    module.cache_weight()
                replace(name, module)
                self._tasks.pop(name, None)

    def _chosen(self, block: _Block, group: LinearGroup) -> list[str]:
        """Return the full names of a group's layers that are to be quantized."""
        return [block.full_name(name) for name in group.linears if block.full_name(name) in self._layers]

    def _wanted(self, block: _Block, group: LinearGroup) -> list[Wanted | None]:
        """Return what the rounding of a group's layers, and what follows it, wants to be measured."""
        pipelines = {self._pipelines[name].text: self._pipelines[name] for name in self._chosen(block, group)}
        return [step.wanted for p in pipelines.values() for step in (p.rounding, *p.of_kind(SideStep))]

    def _measured(
        self, block: _Block, pipeline: Pipeline, wanted: Wanted | None
    ) -> list[tuple[LinearGroup, GroupTask]]:
        """Return the groups of a pipeline with what is wanted of their inputs, the layers included."""
        pairs = self._groups(block.structure, pipeline)
        found = self._measure(block, [group for group, _ in pairs], [wanted])
        return [(group, with_inputs(task, found.get(group.linears[0]))) for group, task in pairs]

    def _measure(
        self, block: _Block, groups: Sequence[LinearGroup], wanted: Sequence[Wanted | None]
    ) -> dict[str, InputStatistics]:
        """Measure the inputs of groups, by the name of each group's first layer; nothing where nothing is wanted."""
        asked = [what for what in wanted if what is not None]
        runner = block.runner
        if not asked or not groups or runner is None:
            return {}
        linears = {block.full_name(group.linears[0]): group.linears[0] for group in groups}
        found = measure_inputs(
            runner,
            block.index,
            {name: self._model.get_submodule(name) for name in linears},
            block.hidden,
            wanted=functools.reduce(operator.or_, asked),
            seed=self._settings.seed,
        )
        return {linears[name]: statistics for name, statistics in found.items()}

    def _fold(self, block: _Block, step: FoldStep, pipeline: Pipeline) -> None:
        """Scale the inputs of every group: folded where that is exact, else kept online."""
        shared = Counter(group.fold.name for group in block.structure.groups if group.fold is not None)
        for group, task in self._measured(block, pipeline, step.wanted):
            fold = group.fold
            if not is_seen(task, step) or (fold is not None and shared[fold.name] > 1):
                continue  # no token came by, or experts behind one norm: no scale suits the tokens of all
            scale = step.input_scale(task)
            if fold is None or task.layers[0].transforms or len(task.layers) < len(group.linears):
                self._keep(transformed(task, [scale_transform(1.0 / scale)]))
                continue
            fold_scale(self._model, block.structure, group, shared_scale(fold, scale))
            self._refresh(block)

    def _refresh(self, block: _Block) -> None:
        """Take the weights of kept tasks from the model again: a fold may have changed rows of a layer before."""
        names = [block.full_name(name) for group in block.structure.groups for name in group.linears]
        for name in names:
            if name in self._tasks:
                weight = float_weight(self._model.get_submodule(name))
                self._tasks[name] = dataclasses.replace(self._tasks[name], weight=weight)

    def _learn(self, block: _Block, step: BlockStep, pipeline: Pipeline) -> None:
        pairs = self._measured(block, pipeline, step.wanted)
        groups = tuple(task for _, task in pairs)

        runner = block.runner
        assert runner is not None

        def forward(stand_ins: Mapping[str, LayerFunction], batch: int) -> Tensor:
            with replaced_forward(stand_ins, self._model):
                return runner.run(block.index, block.hidden[batch])

        problem = BlockProblem(
            groups=groups,
            forward=forward,
            targets=block.targets,
            biases=self._biases(groups),
            seed=self._settings.seed,
            progress=self._progress,
        )
        with torch.enable_grad():
            learned = step.learn(problem)
        shared = Counter(group.fold.name for group in block.structure.groups if group.fold is not None)
        for (group, _), task in zip(pairs, learned, strict=True):
            is_alone = group.fold is not None and shared[group.fold.name] == 1
            self._keep(fold_first_scale(self._model, block.structure, group, task) if is_alone else task)

    def rounded(self, layer: LayerTask) -> QuantizedLinear:
        """Return the module that takes the place of a layer."""
        pipeline = self._pipelines[layer.name]
        tensor = pipeline.rounding.quantize(layer)
        side: tuple[Tensor, Tensor] | None = None
        for step in pipeline.of_kind(SideStep):
            side = step.side(layer, tensor)
        planned = self._layers[layer.name]
        bias = parameter_of(self._model.get_submodule(layer.name), "bias")
        return QuantizedLinear.from_tensor(
            tensor,
            bias=None if bias is None else bias.to(planned.dtype),
            activations=layer.activations,
            method=planned.method,
            kind=planned.kind,
            transforms=layer.transforms,
            low_rank=side,
        )
