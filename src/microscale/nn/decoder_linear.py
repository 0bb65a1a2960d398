"""The linear layers of a decoder as prepared steps: packed weights by the CPU kernels, plain ones as they are.

A group is one linear layer, or several that share their input. Packed layers whose inputs are rounded alike become one
native call, which rounds them on the fly. Activation formats that the kernels refuse, and ranges with a memory, are
rounded by the layer's own quantizer first, bit for bit the same. A weight format that they refuse runs as its module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from microscale.errors import KernelError, LayoutError
from microscale.formats import BlockFormat, ChannelBlock, Format, RangeKind, Rounding, SegmentedFormat, VectorBlock
from microscale.kernels.cpu.activations import activation_refusal
from microscale.kernels.cpu.decoder import Gate, Step, StepKind, prepare_dense_linear, prepare_gate
from microscale.kernels.cpu.linear import Combine, LinearCall, prepare_linear, prepare_segments
from microscale.kernels.cpu.rows16 import NAME as ROWS16
from microscale.nn.linear import QuantizedLinear

FEW_ROWS = 8
"""Up to so many rows the plain linear kernel is taken; from then on torch's matrix product is faster."""
CAST_ROWS = 2048
"""Rows of a bfloat16 weight that are cast to float32 at a time for a product with many rows."""


class Execution(Enum):
    """How a linear layer runs."""

    PACKED = "packed kernel"
    PACKED_ROUNDING = "packed kernel that rounds its inputs"
    PACKED_ROUNDED = "packed kernel, inputs rounded before"
    PLAIN = "plain weights"
    MODULE = "module"


def rows_stand_alone(fmt: Format) -> bool:
    """Whether a format rounds each row of an activation by itself: then a prompt may be cut into chunks."""
    if isinstance(fmt, SegmentedFormat):
        return all(rows_stand_alone(segment.format) for segment in fmt.segments)
    if not isinstance(fmt, BlockFormat) or not isinstance(fmt.block, VectorBlock | ChannelBlock):
        return False
    return fmt.tensor_scale is None and fmt.sparse is None and fmt.rounding is not Rounding.STOCHASTIC


class LinearGroup:
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

    def steps(self, inputs: Float[Tensor, "rows cols"], out: Float[Tensor, "rows rows_out"]) -> list[Step]:
        """Prepare the calls that compute ``out`` from ``inputs``."""
        if self.gate is None or self._is_combined:
            return self._plain_steps(inputs, out)
        pairs = torch.empty(out.shape[0], 2 * self.rows_out)
        return [*self._plain_steps(inputs, pairs), prepare_gate(pairs, out, self.gate)]

    def _plain_steps(self, inputs: Tensor, out: Tensor) -> list[Step]:
        steps: list[Step] = []
        column = 0
        for member in self._members:
            part = out[:, column : column + member.rows_out]
            column += member.rows_out
            if part.is_contiguous():
                steps += member.steps(inputs, part)
                continue
            own = torch.empty(part.shape)
            steps += [*member.steps(inputs, own), _torch_step(functools.partial(part.copy_, own))]
        return steps


class _Packed:
    """One native call over packed weights; inputs go through ``before`` (transforms, a quantizer) first."""

    def __init__(self, call: LinearCall, before: Sequence[nn.Module], execution: Execution, layers: int) -> None:
        self.execution = execution
        self.num_layers = layers
        self._call = call
        self._before = tuple(before)
        self.rows_out = call.rows_out
        self.num_bytes = call.num_bytes

    def steps(self, inputs: Tensor, out: Tensor) -> list[Step]:
        call = self._call
        if not self._before:
            run = functools.partial(call.run_pointers, inputs.data_ptr(), inputs.shape[0], out.data_ptr())
            run.__dict__["holds"] = (inputs, out)
            return [Step(kind=StepKind.LINEAR, run=run)]
        return [_torch_step(lambda: call.run(self._prepared(inputs), out))]

    def _prepared(self, inputs: Tensor) -> Tensor:
        for module in self._before:
            inputs = module(inputs)
        return inputs.contiguous()


class _Plain:
    """A linear layer with float weights, computed in float32."""

    execution = Execution.PLAIN
    num_layers = 1

    def __init__(self, module: nn.Linear) -> None:
        weight = module.weight.detach()
        self._weight = (weight if weight.dtype == torch.bfloat16 else weight.to(torch.float32)).contiguous()
        bias = module.get_parameter("bias") if "bias" in dict(module.named_parameters()) else None
        self._bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        self.rows_out = module.out_features
        self.num_bytes = self._weight.numel() * self._weight.element_size()

    def steps(self, inputs: Tensor, out: Tensor) -> list[Step]:
        if inputs.shape[0] <= FEW_ROWS:
            return [prepare_dense_linear(inputs, self._weight, self._bias, out)]
        return [_torch_step(functools.partial(self._many_rows, inputs, out))]

    def _many_rows(self, inputs: Tensor, out: Tensor) -> None:
        for begin in range(0, self.rows_out, CAST_ROWS):
            end = begin + CAST_ROWS
            bias = None if self._bias is None else self._bias[begin:end]
            out[:, begin:end] = functional.linear(inputs, self._weight[begin:end].to(torch.float32), bias)


class _Module:
    """A packed layer in a format that the kernels do not take, or with a low-rank side path: its module computes it."""

    execution = Execution.MODULE
    num_layers = 1

    def __init__(self, module: QuantizedLinear) -> None:
        self._module = module
        self.rows_out = module.out_features
        self.num_bytes = module.tensor.num_bytes

    def steps(self, inputs: Tensor, out: Tensor) -> list[Step]:
        module = self._module
        return [_torch_step(lambda: out.copy_(module(inputs)))]


def _torch_step(function: Callable[[], object]) -> Step:
    def run() -> None:
        function()

    return Step(kind=StepKind.LINEAR, run=run)


def _members(modules: list[nn.Module], gate: Gate | None) -> list[_Packed | _Plain | _Module]:
    """Merge what can be one call; else every layer stands alone."""
    packed = [module for module in modules if isinstance(module, QuantizedLinear)]
    if len(packed) == len(modules) > 1 and _share_rounding(packed):
        combine = Combine.SILU_MUL if gate is Gate.SILU else Combine.CONCATENATE
        merged = _packed(packed, combine)
        if merged is not None:
            return [merged]
    members: list[_Packed | _Plain | _Module] = []
    for module in modules:
        if isinstance(module, QuantizedLinear):
            members.append(_packed([module], Combine.CONCATENATE) or _Module(module))
        else:
            assert isinstance(module, nn.Linear)
            members.append(_Plain(module))
    return members


def _share_rounding(modules: Sequence[QuantizedLinear]) -> bool:
    if any(module.transforms is not None or module.low_rank is not None for module in modules):
        return False
    specs = {None if module.activations is None else module.activations.spec for module in modules}
    spec = next(iter(specs))
    return len(specs) == 1 and (spec is None or spec.range is RangeKind.DYNAMIC)


def _packed(modules: Sequence[QuantizedLinear], combine: Combine) -> _Packed | None:
    """Prepare the call, or return None where the kernels refuse a format.

    The modules are laid out anew in place: no weight is held twice.
    """
    has_segments = any(isinstance(module.format, SegmentedFormat) for module in modules)
    if any(module.low_rank is not None for module in modules) or (has_segments and len(modules) > 1):
        return None
    quantizer = modules[0].activations
    fmt: Format | None = None
    if quantizer is not None and quantizer.spec.range is RangeKind.DYNAMIC:
        asked = quantizer.spec.format
        fmt, quantizer = (asked, None) if activation_refusal(asked) is None else (None, quantizer)
    before = [module.layout for module in modules]
    try:
        for module in modules:
            module.set_layout(ROWS16)
        if isinstance(modules[0].format, SegmentedFormat):
            call = prepare_segments(modules[0].tensor, fmt, modules[0].bias)
        else:
            call = prepare_linear([m.tensor for m in modules], [m.bias for m in modules], fmt, combine)
    except (KernelError, LayoutError):
        for module, layout in zip(modules, before, strict=True):
            module.set_layout(layout)
        return None
    rounds = Execution.PACKED if quantizer is None else Execution.PACKED_ROUNDED
    before_call = [module for module in (modules[0].transforms, quantizer) if module is not None]
    return _Packed(call, before_call, rounds if fmt is None else Execution.PACKED_ROUNDING, len(modules))
