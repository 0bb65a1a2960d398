"""What runs each layer of a model, and why: formats asked for and executed, backend, kernel, layout, level, refusals.

Nothing is run: the answer is that of the dispatcher to the request that the layer would make in a forward call of the
model without a gradient. The records name the engine, so that another one can be explained in the same words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from microscale.checkpoint.compressed_tensors import ACTIVATION_EQUIVALENTS
from microscale.families.embeddings import is_table
from microscale.families.modules import is_transposed
from microscale.formats import ALIASES, ActivationSpec, Format, RangeKind, format_name, parse_activation, parse_format
from microscale.formats.dtypes import dtype_name
from microscale.kernels import Operation, Request, preferred_layout, why_not
from microscale.kernels.dispatch import choose
from microscale.kernels.layout import why_not_linear
from microscale.layouts.row_major import NAME as ROW_MAJOR
from microscale.nn.attention_setting import NOT_ROUNDED, AttentionFormats, model_attention
from microscale.nn.embedding import NarrowEmbedding
from microscale.nn.linear import QuantizedLinear
from microscale.nn.packed import PackedModule, Precision

TORCH = "torch"
"""What runs layers that are not quantized."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedOver:
    """A backend that was asked, and why it does not run the layer."""

    backend: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerExplanation:
    """How one layer is executed.

    ``kernel`` is the operation with what the backend says of it, ``level`` the instruction-set level or the GPU (None:
    plain torch). ``reason`` says why another format is executed than was requested, and, where a parameter of the model
    asks for a gradient, who runs the layer in its stead while one is recorded. ``layout`` is None for a float weight.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    engine: str
    device: str
    requested: Precision
    executed: Precision
    backend: str
    kernel: str
    layout: str | None
    level: str | None
    passed_over: tuple[PassedOver, ...] = ()
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All layers of a model in a forward call; ``obstacle`` says why nothing runs on that device here (None: it does).

    ``attention`` is what attention is rounded to, simulated in floats. ``why_not_decoder`` says why generating text
    makes such forward calls (None: the decoder runtime generates, on prepared calls of its own).
    """

    layers: tuple[LayerExplanation, ...]
    device: str
    dtype: str
    attention: AttentionFormats = NOT_ROUNDED
    obstacle: str | None = None
    why_not_decoder: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return all fields; formats are named."""
        return dataclasses.asdict(self) | {"attention": self.attention.words}


def explain_model(
    model: nn.Module, *, device: torch.device | None = None, dtype: torch.dtype | None = None, engine: str = TORCH
) -> Explanation:
    """Explain every linear layer and embedding of a model, as it lies or as it would on ``device``.

    ``dtype`` is that of the inputs (default: that of the first float parameter). The weights may lie on ``meta`` where
    a device is named.
    """
    parameters = [each for each in model.parameters() if each.is_floating_point()]
    dtype = dtype or (parameters[0].dtype if parameters else torch.float32)
    place = device or next((each.device for each in (*parameters, *model.buffers())), torch.device("cpu"))
    obstacle = device_obstacle(place)
    layers = tuple(_explain(name, each, device, dtype, engine, obstacle is None) for name, each in _layers(model))
    asking = next((name for name, each in model.named_parameters() if each.requires_grad and not each.is_meta), None)
    if asking is not None:
        found = zip(layers, _layers(model), strict=True)
        layers = tuple(_with_gradient(layer, each, dtype, asking, device) for layer, (_, each) in found)
    return Explanation(
        layers=layers,
        device=str(place),
        dtype=dtype_name(dtype),
        attention=model_attention(model) or NOT_ROUNDED,
        obstacle=obstacle,
    )


def device_obstacle(device: torch.device) -> str | None:
    """Return why nothing can run on a device of this machine, or None where it can."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return f"nothing runs on {device} here ({str(error).splitlines()[0]}); this is what would be tried"
    return None


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    kinds = (PackedModule, nn.Linear, NarrowEmbedding)
    modules = model.named_modules()
    return ((name, one) for name, one in modules if isinstance(one, kinds) or is_table(one) or is_transposed(one))


def _explain(
    name: str, module: nn.Module, device: torch.device | None, dtype: torch.dtype, engine: str, is_at_hand: bool
) -> LayerExplanation:
    if not isinstance(module, PackedModule):
        return _explain_float(name, module, device, engine, is_at_hand)
    place = device or module.tensor.device
    request = _request(module, place, dtype, is_moved=device is not None)
    backend = choose(request)
    executed = Precision(weights=format_name(module.format), activations=_activations_word(module))
    requested = module.requested or executed
    return LayerExplanation(
        layer=name,
        kind=module.kind,
        shape=module.shape,
        engine=engine,
        device=str(place),
        requested=requested,
        executed=executed,
        backend=backend.name,
        kernel=_kernel(module, request, backend.describe(request)),
        layout=request.layout,
        level=backend.level() or _device_level(place, is_at_hand),
        passed_over=tuple(
            PassedOver(backend=other, reason=reason)
            for other, reason in _refusals(module, request).items()
            if reason is not None
        ),
        reason=_difference(requested, executed, module),
    )


def _with_gradient(
    layer: LayerExplanation, module: nn.Module, dtype: torch.dtype, asking: str, device: torch.device | None
) -> LayerExplanation:
    """Say in the reason who runs a layer where the gradient for the parameter ``asking`` reaches it."""
    if not isinstance(module, PackedModule):
        return layer
    request = _request(module, device or module.tensor.device, dtype, is_moved=device is not None)
    recording = choose(dataclasses.replace(request, records_gradient=True))
    if recording.name == layer.backend:
        return layer
    said = (
        f"this holds without gradients: {asking} asks for one, and where that reaches the layer, the {recording.title}"
        " runs it"
    )
    return dataclasses.replace(layer, reason=said if layer.reason is None else f"{layer.reason}; {said}")


def _explain_float(
    name: str, module: nn.Module, device: torch.device | None, engine: str, is_at_hand: bool
) -> LayerExplanation:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    place = device or weight.device
    precision = Precision(weights=dtype_name(weight.dtype))
    is_table = isinstance(module, nn.Embedding | NarrowEmbedding)
    return LayerExplanation(
        layer=name,
        kind="embedding" if is_table else "conv1d" if is_transposed(module) else "linear",
        shape=tuple(weight.shape),
        engine=engine,
        device=str(place),
        requested=precision,
        executed=precision,
        backend=TORCH,
        kernel="embedding" if is_table else "linear",
        layout=None,
        level=_device_level(place, is_at_hand),
    )


def _request(module: PackedModule, device: torch.device, dtype: torch.dtype, *, is_moved: bool) -> Request:
    """Return the request that the module's forward makes."""
    layout = module.layout
    rounding: Format | None = None
    if isinstance(module, QuantizedLinear):
        rounding = module.rounding
        if is_moved:
            layout = preferred_layout(module.tensor, dtype, activations=rounding, device=device)
    elif is_moved:
        layout = ROW_MAJOR
    return Request(
        operation=Operation.LINEAR if isinstance(module, QuantizedLinear) else Operation.DEQUANTIZE,
        format=module.format,
        device=device,
        dtype=dtype,
        layout=layout,
        activations=rounding,
    )


def _refusals(module: PackedModule, request: Request) -> dict[str, str | None]:
    is_linear = request.operation is Operation.LINEAR
    return why_not_linear(request, module.tensor.shape) if is_linear else why_not(request)


def _kernel(module: PackedModule, request: Request, said: str | None) -> str:
    """Return the operation with what is done to the inputs before it and beside it."""
    words = [request.operation.value if said is None else f"{request.operation.value}, {said}"]
    if isinstance(module, QuantizedLinear):
        if module.activations is not None and module.activations.spec.range is not RangeKind.DYNAMIC:
            words.append(f"fake_quantize of the inputs before ({module.activations.spec.range.value} range)")
        if module.transforms is not None:
            words.append(f"transforms before: {' then '.join(str(spec) for spec in module.transforms.specs)}")
        if module.low_rank is not None:
            words.append(f"a path of rank {module.low_rank.rank} beside")
    return "; ".join(words)


def _activations_word(module: PackedModule) -> str | None:
    quantizer = module.activations if isinstance(module, QuantizedLinear) else None
    return None if quantizer is None else str(quantizer.spec)


def _difference(requested: Precision, executed: Precision, module: PackedModule) -> str | None:
    """Return why formats differ, None where they do not: one format may have several words."""
    reasons: list[str] = []
    if parse_format(requested.weights) != module.format:
        reasons.append(f"the method {module.method} chose the format of the weights")
    asked, runs = requested.activations, executed.activations
    if _spec(asked) != _spec(runs):
        is_rule = ACTIVATION_EQUIVALENTS.get(ALIASES.get(asked or "", asked or "")) == _spec(runs) is not None
        reasons.append(
            "the layout compressed-tensors fixes the scale rule of the inputs"
            if is_rule
            else "the setting of the inputs was changed after quantizing"
        )
    return "; ".join(reasons) or None


def _spec(word: str | None) -> ActivationSpec | None:
    return None if word is None else parse_activation(word)


def _device_level(device: torch.device, is_at_hand: bool) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" and is_at_hand else None
