"""Quantize with calibration: one decoder layer after the other, on the inputs that the quantized ones before it give.

The order inside a layer: scales are folded, transforms found, what is learned from the layer's outputs is learned; then
group after group is measured, rounded and replaced, so that each group sees the rounding of those before it (where
layers are fed unquantized inputs, all groups are measured first). After every layer its result and the inputs of the
next can be stored, so that an interrupted job goes on there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from microscale.algorithms.contract import (
    BlockStep,
    LayerFunction,
    LayerProblem,
    ModelProblem,
    ModelStep,
    Progress,
    RefineStep,
    RotationStep,
    SideStep,
    forget,
)
from microscale.algorithms.pipeline import Pipeline
from microscale.algorithms.rtn import Rtn
from microscale.calibration.cache import ActivationStore
from microscale.calibration.statistics import Wanted
from microscale.families.batch import Batch
from microscale.families.running import predict
from microscale.families.structure import LinearGroup, ModelStructure
from microscale.layerwise.blocks import BlockRunner, float32_model, replaced_forward, to_float32
from microscale.layerwise.devices import on_device
from microscale.layerwise.loader import LayerLoader
from microscale.layerwise.returned import Returned
from microscale.layerwise.stream import Flow, LayerStream
from microscale.nn.activation import ranges_at_hand
from microscale.nn.experts import ExpertTokens
from microscale.nn.linear import QuantizedLinear
from microscale.nn.modules import replace_module
from microscale.recipes.calibration import Calibration, ChannelOrder, Feed
from microscale.recipes.folding import fuse_norms, rotation_obstacle
from microscale.recipes.forecast import Forecaster, Tell
from microscale.recipes.matrices import parameter_of
from microscale.recipes.offload import layer_state, restore_layer
from microscale.recipes.plan import PlannedLayer, is_transposed
from microscale.recipes.preparing import ActiveBlock, Preparer
from microscale.recipes.problem_book import ProblemBook
from microscale.recipes.refusals import refuse_whole, refuse_without_text
from microscale.recipes.rotating import rotate_model, rotate_values
from microscale.tensor import QuantizedTensor
from microscale.transforms import AtRunTime

Replace = Callable[[str, QuantizedLinear], None]
"""Puts a module in the place of the one with a name."""
StepT = TypeVar("StepT", ModelStep, RefineStep, RotationStep)


class Quantizer:
    """Quantizes the planned linear layers of a model, each with its own pipeline; the model is changed in place."""

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
        at_run_time: AtRunTime = AtRunTime.ONLINE,
        device: torch.device | None = None,
        forecast: Tell = forget,
    ) -> None:
        """Take a model and what is to become of it; ``device`` is where layers are worked on (None: where they lie)."""
        self._model = model
        self._structure = structure
        self._layers = layers
        self._pipelines = pipelines
        self._calibration = calibration
        self._progress = progress
        self._store = store
        self._loader = loader
        self._device = device
        self._told: list[str] = []
        self._dtypes: Mapping[str, torch.dtype] = {}
        self._book = ProblemBook(model, layers, pipelines)
        self._forecaster = Forecaster(model, structure, layers, calibration, forecast)
        seed = 0 if calibration is None else calibration.seed  # without text nothing is drawn
        order = ChannelOrder.FOLDED if calibration is None else calibration.order
        experts = ExpertTokens.ROUTED if calibration is None else calibration.experts
        self._preparer = Preparer(model, self._book, progress, seed, order, at_run_time, experts)

    @property
    def notes(self) -> list[str]:
        """What a user should know of what was done."""
        return [*self._told, *(self._preparer.notes if self._structure.is_known else ()), *self._preparer.counts.notes]

    @property
    def expert_tokens(self) -> Mapping[str, int]:
        """How many tokens each expert was measured on."""
        return self._preparer.counts.of_experts

    def run(self, replace: Replace) -> list[str]:
        """Quantize every planned layer that lies in a decoder layer; returns their names.

        Raises:
            CalibrationError: a pipeline that needs calibration text where there is none, or the whole model where its
                layers come one by one.
        """
        blocks = self._structure.blocks
        names = [f"{block.name}.{name}" for block in blocks for group in block.groups for name in group.linears]
        if self._loader.is_partial:
            refuse_whole(self._book.distinct)
        whole = self._device if any(pipeline.sees_whole for pipeline in self._book.distinct) else None
        with float32_model(self._model) as self._dtypes, on_device(self._model, whole), ranges_at_hand():
            self._forecaster.begin(self._book.distinct, self._model_problem)
            for step, pipelines in self._sharing(RotationStep):  # the same one twice would be another one
                if step.is_dispensable and rotation_obstacle(self._structure) is not None:
                    rotate_values(self._model, self._structure, step)
                    continue
                if step.is_learned:
                    fuse_norms(self._model, self._structure)
                model = self._model_problem(pipelines) if step.is_learned else None
                rotate_model(self._model, self._structure, step, model)
            self._find_ahead()
            for step, pipelines in self._sharing(ModelStep):
                self._learn_model(step, pipelines)
            if self._is_refined:
                self._stream_and_refine(replace)
            else:
                self._stream(replace)
        return [name for name in names if name in self._layers]

    @property
    def _settings(self) -> Calibration:
        if self._calibration is None:
            refuse_without_text(self._book.distinct)
        assert self._calibration is not None
        return self._calibration

    @property
    def _is_refined(self) -> bool:
        """Whether a step goes on from the rounded model."""
        return any(pipeline.of_kind(RefineStep) for pipeline in self._book.distinct)

    def _stream_and_refine(self, replace: Replace) -> None:
        """Round all layers, then let steps go on from there, the float layers beside the rounded ones."""
        floats: dict[str, nn.Module] = {}
        rounded: dict[str, QuantizedLinear] = {}

        def put(name: str, module: QuantizedLinear) -> None:
            floats[name], rounded[name] = self._model.get_submodule(name), module
            replace(name, module)

        self._stream(put)
        for name, module in floats.items():
            replace_module(self._model, name, module)
        to_float32(self._model)
        for step, pipelines in self._sharing(RefineStep):
            for module in rounded.values():
                module.cache_weight(torch.float32)
            problem = self._model_problem(pipelines)
            with torch.enable_grad():
                learned = step.refine(problem, rounded)
            for group in learned or ():
                self._book.keep(group)
                rounded |= {layer.name: self._module(layer, Rtn().quantize(layer)) for layer in group.layers}
        for name, module in rounded.items():
            module.drop_cached_weight()
            replace(name, module)

    def _find_ahead(self) -> None:
        """Fold scales and cut segments by what the unquantized model gives, for chains that then learn end to end.

        Each layer is measured once the scales of those before it are folded: they change nothing of what it gives.
        """
        pipelines = [pipeline for pipeline in self._book.distinct if pipeline.is_found_ahead]
        if not pipelines:
            return
        blocks = self._structure.blocks
        runner = self._runner(None)
        stream = LayerStream(runner, ActivationStore(None, ""), Flow.EXACT, len(blocks))
        stream.start()
        for index, structure in enumerate(blocks):
            self._progress(index, len(blocks), f"measuring {structure.name}")
            with on_device(self._model.get_submodule(structure.name), self._device):
                block = self._block(index, stream)
                for pipeline in pipelines:
                    self._preparer.find(block, pipeline)
                stream.advance(index)
            stream.finish(index)

    def _sharing(self, kind: type[StepT]) -> list[tuple[StepT, list[Pipeline]]]:
        """Return the steps of a kind, each once, with all chains that have it: their layers are worked on together."""
        found: dict[StepT, list[Pipeline]] = {}
        for pipeline in self._book.distinct:
            for step in pipeline.of_kind(kind):
                found.setdefault(step, []).append(pipeline)
        return list(found.items())

    def _learn_model(self, step: ModelStep, pipelines: Sequence[Pipeline]) -> None:
        """Run a step that sees the whole model; learned weights go into the model too."""
        problem = self._model_problem(pipelines)
        with torch.enable_grad():
            learned = step.learn(problem)
        for group in learned:
            self._book.keep(group)
            for layer in group.layers:
                module = self._model.get_submodule(layer.name)
                weight = module.get_parameter("weight")
                weight.data.copy_(layer.weight.T if is_transposed(module) else layer.weight)

    def _model_problem(self, pipelines: Sequence[Pipeline]) -> ModelProblem:
        """Return the whole model as a function of stand-ins for the layers of some pipelines."""
        settings, book = self._settings, self._book
        pairs = [pair for block in self._structure.blocks for p in pipelines for pair in book.groups(block, p)]
        groups = tuple(group for _, group in pairs)

        def logits(stand_ins: Mapping[str, LayerFunction], batch: Batch) -> Tensor:
            with replaced_forward(stand_ins, self._model):
                return predict(self._model, batch)

        return ModelProblem(
            groups=groups,
            logits=logits,
            windows=settings.samples.to(next(self._model.parameters()).device),
            biases=self._book.biases(groups),
            seed=settings.seed,
            progress=self._progress,
            tell=self._told.append,
        )

    def _stream(self, replace: Replace) -> None:
        """Go through the decoder layers, from the first that no earlier run has finished."""
        blocks = self._structure.blocks
        is_streamed = any(pipeline.is_fed for pipeline in self._book.distinct)
        first = self._restored()
        stream = self._open_stream(first) if is_streamed and first < len(blocks) else None
        for index in range(first, len(blocks)):
            started = time.perf_counter()
            self._progress(index, len(blocks), blocks[index].name)
            self._load(blocks[index].name)
            with on_device(self._model.get_submodule(blocks[index].name), self._device):
                block = self._block(index, stream)
                self._prepare_block(block)
                self._round_block(block, replace)
                if stream is not None:
                    stream.advance(index)
            self._finish(block, stream)
            if index == first and stream is not None:
                self._forecaster.layer_done(index, time.perf_counter() - started)
        self._progress(len(blocks), len(blocks), "")

    def _restored(self) -> int:
        """Take over the layers that an earlier run has finished; returns how many."""
        done = 0 if self._is_refined else self._store.last_complete_layer() or 0
        for index in range(done):
            name = self._structure.blocks[index].name
            restore_layer(self._model, name, self._store.state(index), self._layers)
            self._loader.restored(name)
        return done

    def _open_stream(self, first: int) -> LayerStream:
        settings, blocks = self._settings, self._structure.blocks
        has_learning = any(pipeline.of_kind(BlockStep) for pipeline in self._book.distinct)
        if not first:
            self._load(blocks[0].name)
        runner = self._runner(Returned.from_facts(self._store.facts()) if first else None)
        flow = Flow.EXACT
        if settings.feed is Feed.QUANTIZED:
            flow = Flow.TARGETS if has_learning else Flow.QUANTIZED
        stream = LayerStream(runner, self._store, flow, len(blocks))
        if not first:
            self._store.put_facts(runner.returned.facts)
            stream.start()
        return stream

    def _runner(self, returned: Returned | None) -> BlockRunner:
        settings, names = self._settings, [block.name for block in self._structure.blocks]
        return BlockRunner(
            self._model, names, settings.samples, batch=settings.batch, returned=returned, device=self._device
        )

    def _load(self, name: str) -> None:
        """See that a layer's weights are at hand, in float32."""
        self._loader.load(name)
        to_float32(self._model.get_submodule(name))

    def _block(self, index: int, stream: LayerStream | None) -> ActiveBlock:
        structure = self._structure.blocks[index]
        if stream is None:
            return ActiveBlock(index=index, structure=structure, runner=None, hidden=(), targets=())
        targets = stream.targets(index)
        return ActiveBlock(
            index=index, structure=structure, runner=stream.runner, hidden=stream.inputs(index), targets=targets
        )

    def _finish(self, block: ActiveBlock, stream: LayerStream | None) -> None:
        """Leave a layer behind: what is still float gets its dtype back, and the result is stored."""
        layer = self._model.get_submodule(block.structure.name)
        for module in layer.modules():
            if isinstance(module, QuantizedLinear):
                module.drop_cached_weight()
        for name, parameter in layer.named_parameters():
            parameter.data = parameter.data.to(self._dtypes.get(f"{block.structure.name}.{name}", parameter.dtype))
        if self._store.path is not None:
            self._store.put_state(block.index, layer_state(layer))
        if stream is not None:
            stream.finish(block.index)
        else:
            self._store.finish_layer(block.index + 1)

    def _prepare_block(self, block: ActiveBlock) -> None:
        for pipeline in self._book.distinct:
            if not pipeline.is_found_ahead:
                self._preparer.find(block, pipeline)
        for pipeline in self._book.distinct:  # what is learned for the rows of a weight must not see them change
            self._preparer.learn(block, pipeline)

    def _round_block(self, block: ActiveBlock, replace: Replace) -> None:
        groups = [group for group in block.structure.groups if self._book.chosen(block.structure, group)]
        measure = self._preparer.measure
        is_ahead = self._calibration is not None and self._calibration.feed is Feed.ORIGINAL
        ahead = measure(block, groups, [w for g in groups for w in self._wanted(block, g)]) if is_ahead else {}
        for group in groups:
            found = ahead if is_ahead else measure(block, [group], self._wanted(block, group))
            inputs = found.pop(group.linears[0], None)
            for name in self._book.chosen(block.structure, group):
                module = self.rounded(dataclasses.replace(self._book.problem(name), inputs=inputs))
                if block.runner is not None:
                    module.cache_weight(torch.float32)
                replace(name, module)
                if not self._is_refined:
                    self._book.drop(name)

    def _wanted(self, block: ActiveBlock, group: LinearGroup) -> list[Wanted | None]:
        """Return what the rounding of a group's layers, and what follows it, wants to be measured."""
        names = self._book.chosen(block.structure, group)
        pipelines = {self._pipelines[name].text: self._pipelines[name] for name in names}
        return [step.wanted for p in pipelines.values() for step in (p.rounding, *p.of_kind(SideStep))]

    def rounded(self, layer: LayerProblem) -> QuantizedLinear:
        """Return the module that takes the place of a layer."""
        pipeline = self._pipelines[layer.name]
        tensor = pipeline.rounding.quantize(layer)
        side: tuple[Tensor, Tensor] | None = None
        for step in pipeline.of_kind(SideStep):
            side = step.side(layer, tensor)
        return self._module(layer, tensor, side)

    def _module(
        self, layer: LayerProblem, tensor: QuantizedTensor, side: tuple[Tensor, Tensor] | None = None
    ) -> QuantizedLinear:
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
