"""The linear layers of a decoder as operations: packed weights in one call where a compiled backend takes them so.

A group is one linear layer, or several that share their input. Packed layers whose inputs are rounded alike become one
call, which rounds them on the fly. Activation formats that the kernels refuse, and ranges with a memory, are rounded by
the layer's own quantizer first, bit for bit the same. What no compiled backend takes runs layer by layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microscale.formats import BlockFormat, ChannelBlock, Format, RangeKind, Rounding, SegmentedFormat, VectorBlock
from microscale.kernels import Combine, Gate, WeightGroup, preferred_layout
from microscale.kernels.backend import Call, Operation, PlanStep, StepKind
from microscale.kernels.decoder_ops import gate as gate_call
from microscale.kernels.decoder_ops import linear_dense, linear_group, linear_group_requests
from microscale.kernels.dispatch import why_not_compiled
from microscale.nn.linear import QuantizedLinear


class Execution(Enum):
    """How a linear layer runs."""

    PACKED = "packed kernel"
    PACKED_ROUNDING = "packed kernel that rounds its inputs"
    PACKED_ROUNDED = "packed kernel, inputs rounded before"
    PLAIN = "plain weights"
    MODULE = "module"
    """As its module computes it: on the reference backend, or with a low-rank side path."""


def rows_stand_alone(fmt: Format) -> bool:
    """Whether a format rounds each row of an activation by itself: then a prompt may be cut into chunks."""
    if isinstance(fmt, SegmentedFormat):
        return all(rows_stand_alone(segment.format) for segment in fmt.segments)
    if not isinstance(fmt, BlockFormat) or not isinstance(fmt.block, VectorBlock | ChannelBlock):
        return False
    return fmt.tensor_scale is None and fmt.sparse is None and fmt.rounding is not Rounding.STOCHASTIC


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """Layers that one call computes: ``calls(inputs, out)`` gives it, with what runs before it."""

    execution: Execution
    num_layers: int
    rows_out: int
    num_bytes: int
    calls: Callable[[Tensor, Tensor], list[Call | PlanStep]]


class LinearCalls:
    """Linear layers that share their input: outputs side by side, or act(first) · second with a ``gate``.

    ``num_bytes`` counts the weights that one call reads.
    """

    def __init__(self, modules: Sequence[nn.Module], gate: Gate | None = None) -> None:
        self.gate = gate
        self._members = _members(list(modules), gate)
        widths = sum(member.rows_out for member in self._members)
        self._is_combined = gate is Gate.SILU and len(self._members) == 1
        self.rows_out = widths if gate is None or self._is_combined else widths // 2
        self.num_bytes = sum(member.num_bytes for member in self._members)
        self.executions = [member.execution for member in self._members for _ in range(member.num_layers)]

    def calls(self, inputs: Float[Tensor, "rows cols"], out: Float[Tensor, "rows rows_out"]) -> list[Call | PlanStep]:
        """Return the calls that compute ``out`` from ``inputs``."""
        if self.gate is None or self._is_combined:
            return self._plain_calls(inputs, out)
        pairs = out.new_empty(out.shape[0], 2 * self.rows_out)
        return [*self._plain_calls(inputs, pairs), gate_call(pairs, out, self.gate)]

    def _plain_calls(self, inputs: Tensor, out: Tensor) -> list[Call | PlanStep]:
        calls: list[Call | PlanStep] = []
        column = 0
        for member in self._members:
            part = out[:, column : column + member.rows_out]
            column += member.rows_out
            if part.is_contiguous():
                calls += member.calls(inputs, part)
                continue
            own = part.new_empty(part.shape)
            calls += [*member.calls(inputs, own), _step(functools.partial(part.copy_, own))]
        return calls


def _step(function: Callable[[], object]) -> PlanStep:
    return PlanStep(kinds=(StepKind.LINEAR,), run=function)


def _members(modules: list[nn.Module], gate: Gate | None) -> list[_Member]:
    """Merge what can be one call; else every layer stands alone."""
    packed = [module for module in modules if isinstance(module, QuantizedLinear)]
    if len(packed) == len(modules) > 1 and _share_rounding(packed):
        merged = _packed(packed, Combine.SILU_MUL if gate is Gate.SILU else Combine.CONCATENATE)
        if merged is not None:
            return [merged]
    return [_member(module) for module in modules]


def _member(module: nn.Module) -> _Member:
    if not isinstance(module, QuantizedLinear):
        assert isinstance(module, nn.Linear)
        return _plain(module)
    if module.low_rank is not None:
        return _Member(
            execution=Execution.MODULE,
            num_layers=1,
            rows_out=module.out_features,
            num_bytes=module.tensor.num_bytes,
            calls=lambda inputs, out: [_step(lambda: out.copy_(module(inputs)))],
        )
    found = _packed([module], Combine.CONCATENATE)
    return found or _packed_member([module], *next(_roundings(module)), Combine.CONCATENATE, Execution.MODULE)


def _share_rounding(modules: Sequence[QuantizedLinear]) -> bool:
    if any(module.transforms is not None or module.low_rank is not None for module in modules):
        return False
    specs = {None if module.activations is None else module.activations.spec for module in modules}
    spec = next(iter(specs))
    return len(specs) == 1 and (spec is None or spec.range is RangeKind.DYNAMIC)


def _roundings(module: QuantizedLinear) -> Iterator[tuple[Format | None, tuple[nn.Module, ...]]]:
    """Yield the ways to round a layer's input: the format that the call rounds to, and the modules that run before."""
    before = () if module.transforms is None else (module.transforms,)
    if module.rounding is not None:
        yield module.rounding, before
    yield None, before if module.activations is None else (*before, module.activations)


def _packed(modules: Sequence[QuantizedLinear], combine: Combine) -> _Member | None:
    """Return the call of a compiled backend, or None where they refuse a format.

    The modules are laid out anew in place: no weight is held twice.
    """
    for fmt, before in _roundings(modules[0]):
        tensors = [module.tensor for module in modules]
        layouts = [
            preferred_layout(tensor, torch.float32, activations=fmt, operation=Operation.LINEAR_GROUP)
            for tensor in tensors
        ]
        weights = [(tensor.format, layout) for tensor, layout in zip(tensors, layouts, strict=True)]
        requests = linear_group_requests(weights, fmt, torch.float32, tensors[0].device)
        if why_not_compiled(*requests) is not None:
            continue
        for module, layout in zip(modules, layouts, strict=True):
            module.set_layout(layout)
        execution = Execution.PACKED_ROUNDING if fmt is not None else Execution.PACKED
        if modules[0].activations in before:
            execution = Execution.PACKED_ROUNDED
        return _packed_member(modules, fmt, before, combine, execution)
    return None


def _packed_member(
    modules: Sequence[QuantizedLinear],
    fmt: Format | None,
    before: tuple[nn.Module, ...],
    combine: Combine,
    execution: Execution,
) -> _Member:
    group = WeightGroup(
        weights=tuple(module.tensor for module in modules),
        biases=tuple(_as_float32(module.bias) for module in modules),
        activations=fmt,
        combine=combine,
    )

    def calls(inputs: Tensor, out: Tensor) -> list[Call | PlanStep]:
        steps: list[Call | PlanStep] = []
        if before:
            given, inputs = inputs, torch.empty_like(inputs)
            steps.append(_step(functools.partial(_run_before, before, given, inputs)))
        return [*steps, linear_group(inputs, group, out)]

    return _Member(
        execution=execution, num_layers=len(modules), rows_out=group.rows_out, num_bytes=group.num_bytes, calls=calls
    )


def _run_before(modules: Sequence[nn.Module], inputs: Tensor, out: Tensor) -> None:
    for module in modules:
        inputs = module(inputs)
    out.copy_(inputs)


def _plain(module: nn.Linear) -> _Member:
    """Return the call for a layer with float weights, computed in float32."""
    weight = module.weight.detach()
    weight = (weight if weight.dtype == torch.bfloat16 else weight.to(torch.float32)).contiguous()
    bias = _as_float32(dict(module.named_parameters()).get("bias"))
    return _Member(
        execution=Execution.PLAIN,
        num_layers=1,
        rows_out=module.out_features,
        num_bytes=weight.numel() * weight.element_size(),
        calls=lambda inputs, out: [linear_dense(inputs, weight, bias, out)],
    )


def _as_float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to(torch.float32).contiguous()
