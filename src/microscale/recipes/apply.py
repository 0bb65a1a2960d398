"""Apply a plan to a model: replace one module after the other, so that memory stays near one copy of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microscale.algorithms import FoldStep, LayerTask, Pipeline, Progress, parse_method
from microscale.errors import NonFiniteError
from microscale.families import describe, is_transposed
from microscale.formats import ActivationSpec, BlockFormat, Format, NaNPolicy, PairFormat
from microscale.nn import ActivationQuantizer, PackedModule, QuantizedEmbedding, QuantizedLinear
from microscale.recipes.calibrated import Calibration, Quantizer
from microscale.recipes.plan import Plan, PlannedLayer, make_plan
from microscale.recipes.recipe import Recipe
from microscale.recipes.replacing import replace_module, untie


def ignore_progress(done: int, total: int, name: str) -> None:
    """Report nothing."""
    del done, total, name


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """What was done to a model: the plan and the bytes of the quantized weights."""

    plan: Plan
    num_weights: int
    num_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits for each quantized weight, scales and all other parts included."""
        return 8 * self.num_bytes / self.num_weights


def quantize_model(
    model: nn.Module,
    recipe: Recipe,
    progress: Progress = ignore_progress,
    *,
    calibration: Calibration | None = None,
    part: str = "language",
) -> QuantizationReport:
    """Replace the model's modules as the recipe says; the model is changed in place.

    Raises:
        ModelError, RecipeError, LayoutError: before anything is changed; see :func:`make_plan`.
        CalibrationError: a method that needs calibration text where there is none, or text that does not serve it.
        NonFiniteError: a weight with NaN or Inf (its name in the message), unless the recipe says poison.
    """
    plan = make_plan(model, recipe)
    layers = {layer.name: poisoned(layer) if recipe.nan == "poison" else layer for layer in plan.layers}
    for layer in plan.layers:
        check_weight(model.get_submodule(layer.name), layer, recipe.nan == "poison")
    pipelines = {name: parse_method(layer.method, effort=recipe.effort) for name, layer in layers.items()}
    shared = {pipeline.text: pipeline for pipeline in pipelines.values()}
    pipelines = {name: shared[pipeline.text] for name, pipeline in pipelines.items()}
    structure = describe(model, part)
    linears = {name: layer for name, layer in layers.items() if layer.kind != "embedding"}
    quantizer = Quantizer(model, structure, linears, pipelines, calibration, progress)
    done = set(quantizer.run(lambda name, module: replace_module(model, name, module)))
    for name, layer in layers.items():
        if name not in done:
            replace_module(model, name, quantize_module(model.get_submodule(name), layer, pipelines[name]))
    untie(model, set(layers))
    num_weights = sum(layer.shape[0] * layer.shape[1] for layer in plan.layers)
    modules = [model.get_submodule(name) for name in layers]
    num_bytes = sum(m.num_bytes if isinstance(m, QuantizedLinear) else packed_bytes(m) for m in modules)
    notes = plan.notes if structure.is_known else (*plan.notes, unknown_note(model, shared))
    plan = dataclasses.replace(plan, notes=tuple(note for note in notes if note))
    return QuantizationReport(plan=plan, num_weights=num_weights, num_bytes=num_bytes)


def packed_bytes(module: nn.Module) -> int:
    """Return the bytes of a packed module's weight."""
    assert isinstance(module, PackedModule)
    return module.tensor.num_bytes


def unknown_note(model: nn.Module, pipelines: Mapping[str, Pipeline]) -> str:
    """Say that a family without a record gets no folding, where a method would fold."""
    folding = [text for text, pipeline in pipelines.items() if pipeline.of_kind(FoldStep)]
    if not folding:
        return ""
    kind = type(model).__name__
    return f"{kind} is no family we have a record of: {folding[0]} keeps its scales online, nothing is folded"


def poisoned(layer: PlannedLayer) -> PlannedLayer:
    """Return the layer with the policy that NaN poisons its block."""
    return dataclasses.replace(layer, format=poisoning(layer.format))


def check_weight(module: nn.Module, layer: PlannedLayer, poison: bool) -> None:
    """Refuse non-finite weights.

    Raises:
        NonFiniteError: naming the tensor.
    """
    weight = module.get_parameter("weight")
    if poison or bool(torch.isfinite(weight).all()):
        return
    num_bad = int((~torch.isfinite(weight)).sum())
    raise NonFiniteError(
        f"{layer.name}.weight holds {num_bad} NaN or Inf value(s) out of {weight.numel()}; mend the model, or let them"
        " poison their blocks (--nan poison, nan: poison in a recipe)"
    )


def quantize_module(module: nn.Module, layer: PlannedLayer, pipeline: Pipeline) -> PackedModule:
    """Return the packed module that takes the place of an embedding, or of a linear layer outside of the blocks.

    What a pipeline learns from inputs does not reach these: they are rounded on their own.
    """
    weight = module.get_parameter("weight").detach()
    matrix = (weight.T.contiguous() if is_transposed(module) else weight).to(torch.float32)
    task = LayerTask(
        name=layer.name, weight=matrix, format=layer.format, activations=layer.activations, dtype=layer.dtype
    )
    tensor = pipeline.rounding.quantize(task)
    if layer.kind == "embedding":
        return QuantizedEmbedding.from_tensor(tensor, method=layer.method)
    bias = getattr(module, "bias", None)
    return QuantizedLinear.from_tensor(
        tensor,
        bias=bias if isinstance(bias, Tensor) else None,
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
    return fmt if fmt.scale.nan_code is None else dataclasses.replace(fmt, nan_policy=NaNPolicy.POISON_BLOCK)


def set_activations(model: nn.Module, spec: ActivationSpec | None) -> None:
    """Give every packed linear layer the same activation setting, or none."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.activations = None if spec is None else ActivationQuantizer(spec, device=module.tensor.device)
