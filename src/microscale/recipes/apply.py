"""Apply a plan to a model: replace one module after the other, so that memory stays near one copy of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from microscale.algorithms.contract import (
    BlockStep,
    FoldStep,
    ModelStep,
    Progress,
    RefineStep,
    RotationStep,
    SegmentStep,
    TransformStep,
    forget,
)
from microscale.algorithms.pipeline import Pipeline
from microscale.calibration.cache import ActivationStore
from microscale.errors import NonFiniteError, counted
from microscale.families.look_up import describe
from microscale.families.structure import ModelStructure
from microscale.formats import (
    ActivationSpec,
    BlockFormat,
    Format,
    NaNPolicy,
    PairFormat,
    SegmentedFormat,
    VectorBlock,
)
from microscale.layerwise.devices import device_of, on_device
from microscale.layerwise.loader import LayerLoader, LayerSource
from microscale.nn.activation import ActivationQuantizer
from microscale.nn.embedding import QuantizedEmbedding
from microscale.nn.experts import unstack_experts
from microscale.nn.linear import QuantizedLinear
from microscale.nn.modules import replace_module, tell_quantized, untie
from microscale.nn.packed import PackedModule, Precision
from microscale.nn.sizes import Size, packed_size
from microscale.recipes.calibrated import Quantizer
from microscale.recipes.calibration import Calibration, CalibrationText
from microscale.recipes.folding import check_rotation, rotation_obstacle
from microscale.recipes.forecast import Tell
from microscale.recipes.matrices import parameter_of
from microscale.recipes.plan import Plan, PlannedLayer, make_plan
from microscale.recipes.problems import layer_problem
from microscale.recipes.ranges import check_observer
from microscale.recipes.recipe import NanWord, Recipe
from microscale.recipes.refusals import refuse_whole, refuse_without_text
from microscale.recipes.tying import tied_groups
from microscale.tensor import QuantizedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport(Size):
    """What was done to a model: the plan, the size of the quantized layers, and how many tokens each expert saw."""

    plan: Plan
    expert_tokens: Mapping[str, int]


class Walk(Enum):
    """How a job goes through a model: all of it lies in memory, or its decoder layers come one by one."""

    WHOLE = "whole"
    LAYERS = "layers"


def check_job(model: nn.Module, recipe: Recipe, *, observer: str | None, text: CalibrationText, walk: Walk) -> None:
    """Refuse all that can be refused without a weight or a text: ``model`` may lie on ``meta``.

    Stacked experts are taken apart, nothing else is changed. ``observer`` is what a user named for static ranges.

    Raises:
        ModelError, RecipeError, LayoutError: see :func:`make_plan`; a model that a chain does not suit.
        CalibrationError: a chain that needs text or the whole model and will not get it, or an observer that is
            unknown, does not fit a format, or that nothing would use.
    """
    unstack_experts(model)
    layers = {layer.name: layer for layer in make_plan(model, recipe).layers}
    pipelines = list({pipeline.text: pipeline for pipeline in pipelines_of(layers).values()}.values())
    check_observer(observer, [layer.activations for layer in layers.values()], text)
    if text is CalibrationText.ABSENT:
        refuse_without_text(pipelines)
    if walk is Walk.LAYERS:
        refuse_whole(pipelines)
    structure_for(model, recipe.part, pipelines, walk)


def quantize_model(
    model: nn.Module,
    recipe: Recipe,
    progress: Progress = lambda done, total, name: None,
    *,
    calibration: Calibration | None = None,
    store: ActivationStore | None = None,
    source: LayerSource | None = None,
    device: torch.device | None = None,
    forecast: Tell = forget,
) -> QuantizationReport:
    """Replace the model's modules as the recipe says; the model is changed in place.

    Stacked experts are taken apart first (:func:`~microscale.nn.experts.unstack_experts`). ``calibration`` is what
    methods other than the plainest learn from. A ``store`` on disk (:func:`~microscale.recipes.offload.open_store`)
    keeps the inputs of the decoder layers and every finished one, so that the same job started again goes on behind
    it; it is cleared by who opened it. ``source`` gives the weights of the decoder layers that the model was built
    without, one layer at a time. ``device`` is where the work is done (None: where the model lies): layers come there
    one after the other and go back, the model as a whole only for steps that see all of it. ``forecast`` is told what a
    job with calibration will take, before a step that sees the whole model and after the first decoder layer.

    Raises:
        ModelError, RecipeError, LayoutError: before any weight is changed; see :func:`make_plan`.
        CalibrationError: a method that needs calibration text where there is none, or text that does not serve it; a
            method for the whole model at once where there is a source; a store that cannot be written or read.
        NonFiniteError: a weight with NaN or Inf (its name in the message), unless the recipe says poison; before any is
            changed, or when its layer comes from the source.
        DeviceError: the device's memory does not suffice.
    """
    unstack_experts(model)
    plan = make_plan(model, recipe)
    layers = {layer.name: poisoned(layer) if recipe.nan == "poison" else layer for layer in plan.layers}
    pipelines = pipelines_of(layers)
    is_layered = source is not None or (store is not None and store.path is not None)
    walk = Walk.LAYERS if is_layered else Walk.WHOLE
    structure, notes = structure_for(model, recipe.part, list(pipelines.values()), walk)
    if rotation_obstacle(structure) is None:
        notes += rotation_notes(model, layers, pipelines)

    def check(inside: str) -> None:
        for layer in plan.layers:
            if not inside or layer.name.startswith(f"{inside}."):
                check_weight(model.get_submodule(layer.name), layer, recipe.nan)

    check("")
    loader = LayerLoader(model, source, check)
    linears = {name: layer for name, layer in layers.items() if layer.kind != "embedding"}
    store = ActivationStore(None, "") if store is None else store
    quantizer = Quantizer(
        model,
        structure,
        linears,
        pipelines,
        calibration,
        progress,
        store,
        loader,
        recipe.at_run_time,
        device,
        forecast,
    )
    done = set(quantizer.run(lambda name, module: replace_module(model, name, module))) if structure.blocks else set()
    notes += quantizer.notes
    loader.load_rest()
    rest = [name for name in layers if name not in done]
    owners = _owners(model, layers)
    makers = {owner: name for name, owner in owners.items() if layers[name].kind != "embedding"}
    for index, name in enumerate(sorted(rest, key=lambda name: name in owners)):
        progress(index, len(rest), name)
        module, maker = model.get_submodule(name), makers.get(name, name)
        if name in owners:
            owner = model.get_submodule(owners[name])
            assert isinstance(owner, PackedModule)
            packed = packed_module(module, layers[name], owner.tensor)
            packed.share(owner)
        else:
            home = device_of(module)
            with on_device(module, device):
                tensor = rounded(module, layers[maker], pipelines[maker])
                packed = packed_module(module, dataclasses.replace(layers[name], method=layers[maker].method), tensor)
            packed = packed.to(home)
        replace_module(model, name, packed)
    if rest:
        progress(len(rest), len(rest), "")
    untie(model, set(layers), owners)
    tell_quantized(model)
    size = packed_size(model.get_submodule(name) for name in layers)
    _note_requests(model, plan.layers)
    executed = tuple(executed_layer(layer, model.get_submodule(layer.name)) for layer in plan.layers)
    plan = dataclasses.replace(plan, layers=executed, notes=(*plan.notes, *notes))
    return QuantizationReport(
        plan=plan,
        expert_tokens=quantizer.expert_tokens,
        num_weights=size.num_weights,
        num_bytes=size.num_bytes,
    )


def _owners(model: nn.Module, layers: Mapping[str, PlannedLayer]) -> dict[str, str]:
    """Return which layers use the weight of which embedding: they still share it, and are to have one format."""
    return {
        name: owner
        for owner, *others in tied_groups(model)
        for name in others
        if owner in layers and name in layers and layers[owner].format == layers[name].format
    }


def _note_requests(model: nn.Module, layers: Sequence[PlannedLayer]) -> None:
    """Tell every packed module the words that were asked for it."""
    for layer in layers:
        asked = layer.requested_activations
        module = model.get_submodule(layer.name)
        assert isinstance(module, PackedModule)
        module.requested = Precision(
            weights=str(layer.requested_weights), activations=None if asked is None else str(asked)
        )


def pipelines_of(layers: Mapping[str, PlannedLayer]) -> dict[str, Pipeline]:
    """Return the chain of each layer; layers of one method share one record."""
    chains: dict[Pipeline, Pipeline] = {}
    return {name: chains.setdefault(layer.pipeline, layer.pipeline) for name, layer in layers.items()}


def structure_for(
    model: nn.Module, part: str, pipelines: Sequence[Pipeline], walk: Walk = Walk.WHOLE
) -> tuple[ModelStructure, list[str]]:
    """Return the structure that the chains work on, and what a user should know of it.

    Plain rounding needs none, unless it goes layer by layer. Text runs through the language part
    alone, so that what learns from inputs reaches no other part.

    Raises:
        ModelError: a model whose layers cannot be told apart, where a chain must know them, or whose residual stream
            cannot be rotated, where a chain does so.
    """
    kinds = (RotationStep, ModelStep, RefineStep, FoldStep, TransformStep, SegmentStep, BlockStep)
    is_plain = not any(pipeline.is_streamed or any(map(pipeline.of_kind, kinds)) for pipeline in pipelines)
    if is_plain and walk is Walk.WHOLE:
        return NO_BLOCKS, []
    notes: list[str] = []
    needs_text = any(pipeline.needs_calibration for pipeline in pipelines)
    if needs_text and part != "language":
        notes.append("calibration text reaches the language part alone; other layers are rounded on their own")
    structure = describe(model, "language" if needs_text else part)
    rotations = {step for pipeline in pipelines for step in pipeline.of_kind(RotationStep)}
    if any(not step.is_dispensable for step in rotations):
        check_rotation(structure)
    obstacle = rotation_obstacle(structure) if rotations else None
    if obstacle is not None:
        words = ", ".join(sorted(step.name for step in rotations))
        notes.append(f"{words} turns the values of attention alone; the residual stream cannot be rotated: {obstacle}")
    folding = [pipeline.text for pipeline in pipelines if pipeline.of_kind(FoldStep)]
    if folding and not structure.is_known:
        kind = type(model).__name__
        notes.append(
            f"{kind} is of no family that we have a record of: {folding[0]} folds nothing; its scales stay online, or"
            " are left out where the layout has no place for them"
        )
    return structure, notes


def rotation_notes(
    model: nn.Module, layers: Mapping[str, PlannedLayer], pipelines: Mapping[str, Pipeline]
) -> list[str]:
    """Return what a rotation of the residual stream does to block scales and to a head that was tied."""
    notes: list[str] = []
    rotated = [(pipelines[name].of_kind(RotationStep), layer.format) for name, layer in layers.items()]
    for steps, fmt in rotated:
        if not isinstance(fmt, BlockFormat) or not isinstance(fmt.block, VectorBlock):
            continue
        size = fmt.block.size
        if fmt.scale.is_power_of_two and any(step.crosses(size) for step in steps):
            notes.append(
                f"{steps[0].name} rotates across blocks, which makes block scales that are powers of two coarser"
                " (arXiv 2511.04214); a rotation inside of blocks (method mr-gptq) keeps more of the model"
            )
            break
    word = next((steps[0].name for steps, _ in rotated if steps), None)
    if word is not None and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        notes.append(f"{word} turns head and embedding apart: the head, which was tied, gets a weight of its own")
    return notes


NO_BLOCKS = ModelStructure(
    family="", is_known=True, blocks=(), embeddings=(), final_norm=None, head=None, part="language"
)
"""Of a model whose structure plays no part."""


def executed_layer(layer: PlannedLayer, module: nn.Module) -> PlannedLayer:
    """Return the layer with the formats that its module has: a method may have chosen segments."""
    assert isinstance(module, PackedModule)
    quantizer = module.activations if isinstance(module, QuantizedLinear) else None
    activations = None if quantizer is None else quantizer.spec
    return dataclasses.replace(layer, format=module.format, activations=activations)


def poisoned(layer: PlannedLayer) -> PlannedLayer:
    """Return the layer with the policy that NaN poisons its block."""
    return dataclasses.replace(layer, format=poisoning(layer.format))


def check_weight(module: nn.Module, layer: PlannedLayer, nan: NanWord) -> None:
    """Refuse non-finite weights, unless they may poison their blocks.

    Raises:
        NonFiniteError: naming the tensor.
    """
    weight = module.get_parameter("weight")
    if nan == "poison" or weight.is_meta or bool(torch.isfinite(weight).all()):
        return  # what is still in its file is looked at when it comes
    num_bad = int((~torch.isfinite(weight)).sum())
    raise NonFiniteError(
        f"{layer.name}.weight holds {counted(num_bad, 'NaN or Inf value')} out of {weight.numel()};"
        " mend the model, or let them"
        " poison their blocks (--nan poison, nan: poison in a recipe)"
    )


def quantize_module(module: nn.Module, layer: PlannedLayer, pipeline: Pipeline) -> PackedModule:
    """Return the packed module that takes the place of an embedding, or of a linear layer outside of the blocks.

    What a pipeline learns from inputs does not reach these: they are rounded on their own.
    """
    return packed_module(module, layer, rounded(module, layer, pipeline))


def rounded(module: nn.Module, layer: PlannedLayer, pipeline: Pipeline) -> QuantizedTensor:
    """Return the weight of a module, quantized on its own."""
    return pipeline.rounding.quantize(layer_problem(layer, module))


def packed_module(module: nn.Module, layer: PlannedLayer, tensor: QuantizedTensor) -> PackedModule:
    """Return the packed module of a weight that takes the place of a float one."""
    if layer.kind == "embedding":
        return QuantizedEmbedding.from_tensor(tensor, method=layer.method, original=module)
    return QuantizedLinear.from_tensor(
        tensor,
        bias=parameter_of(module, "bias"),
        activations=layer.activations,
        method=layer.method,
        kind=layer.kind,
    )


def poisoning(fmt: Format) -> Format:
    """Return the format with the policy that NaN poisons its block, where its scale can say NaN."""
    if isinstance(fmt, PairFormat):
        low, high = poisoning(fmt.low), poisoning(fmt.high)
        assert isinstance(low, BlockFormat) and isinstance(high, BlockFormat)
        return dataclasses.replace(fmt, low=low, high=high)
    if isinstance(fmt, SegmentedFormat):
        parts = [(segment, poisoning(segment.format)) for segment in fmt.segments]
        segments = [dataclasses.replace(s, format=part) for s, part in parts if isinstance(part, BlockFormat)]
        return SegmentedFormat(segments=tuple(segments))
    return fmt if fmt.scale.nan_code is None else dataclasses.replace(fmt, nan_policy=NaNPolicy.POISON_BLOCK)


def set_activations(model: nn.Module, spec: ActivationSpec | None) -> None:
    """Give every packed linear layer the same activation setting, or none."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.activations = None if spec is None else ActivationQuantizer(spec, device=module.tensor.device)
