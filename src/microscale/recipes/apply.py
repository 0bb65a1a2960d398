"""Apply a plan to a model: replace one module after the other, so that memory stays near one copy of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microscale.algorithms import METHODS
from microscale.errors import NonFiniteError
from microscale.families import is_transposed
from microscale.formats import ActivationSpec, BlockFormat, Format, NaNPolicy, PairFormat
from microscale.nn import ActivationQuantizer, PackedModule, QuantizedEmbedding, QuantizedLinear
from microscale.recipes.experts import unstack_experts
from microscale.recipes.modules import replace_module, untie
from microscale.recipes.plan import Plan, PlannedLayer, make_plan
from microscale.recipes.recipe import Recipe

Progress = Callable[[int, int, str], None]
"""Called with (done, total, name of the layer at hand)."""


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


def quantize_model(model: nn.Module, recipe: Recipe, progress: Progress = ignore_progress) -> QuantizationReport:
    """Replace the model's modules as the recipe says; the model is changed in place.

    Stacked experts are taken apart first (:func:`~microscale.recipes.experts.unstack_experts`).

    Raises:
        ModelError, RecipeError, LayoutError: before any weight is changed; see :func:`make_plan`.
        NonFiniteError: a weight with NaN or Inf (its name in the message), unless the recipe says poison.
    """
    unstack_experts(model)
    plan = make_plan(model, recipe)
    for layer in plan.layers:
        check_weight(model.get_submodule(layer.name), layer, recipe.nan == "poison")
    num_bytes = 0
    for done, layer in enumerate(plan.layers):
        progress(done, len(plan.layers), layer.name)
        module = quantize_module(model.get_submodule(layer.name), layer, poison=recipe.nan == "poison")
        num_bytes += module.tensor.num_bytes
        replace_module(model, layer.name, module)
    progress(len(plan.layers), len(plan.layers), "")
    untie(model, {layer.name for layer in plan.layers})
    num_weights = sum(layer.shape[0] * layer.shape[1] for layer in plan.layers)
    return QuantizationReport(plan=plan, num_weights=num_weights, num_bytes=num_bytes)


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


def quantize_module(module: nn.Module, layer: PlannedLayer, *, poison: bool = False) -> PackedModule:
    """Return the packed module that takes the place of a linear layer or an embedding."""
    weight = module.get_parameter("weight").detach()
    matrix = weight.T.contiguous() if is_transposed(module) else weight
    fmt = poisoning(layer.format) if poison else layer.format
    tensor = METHODS[layer.method](matrix, fmt, name=f"{layer.name}.weight")
    if layer.kind == "embedding":
        return QuantizedEmbedding.from_tensor(tensor, method=layer.method)
    bias = getattr(module, "bias", None)
    bias_tensor = bias if isinstance(bias, Tensor) else None
    return QuantizedLinear.from_tensor(
        tensor, bias=bias_tensor, activations=layer.activations, method=layer.method, kind=layer.kind
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
