"""QuantizedLinear: a linear layer with a packed weight and, on request, quantized inputs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from microscale.formats import ActivationSpec, Format, RangeKind
from microscale.kernels import linear
from microscale.nn.activation import ActivationQuantizer
from microscale.nn.packed import PackedModule
from microscale.tensor import QuantizedTensor


class QuantizedLinear(PackedModule):
    """y = quantize(x) @ W.T + bias with W [out_features, in_features] packed, computed in the dtype of x."""

    bias: nn.Parameter | None
    activations: ActivationQuantizer | None

    def __init__(
        self,
        fmt: Format,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        bias: bool = False,
        activations: ActivationSpec | None = None,
        device: torch.device | str | None = None,
        method: str = "rtn",
        kind: str = "linear",
    ) -> None:
        super().__init__(fmt, shape, dtype=dtype, device=device, method=method, kind=kind)
        self.out_features, self.in_features = shape
        empty = torch.empty(self.out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))
        self.activations = None if activations is None else ActivationQuantizer(activations, device=device)

    @classmethod
    def from_tensor(
        cls,
        tensor: QuantizedTensor,
        *,
        bias: Tensor | None = None,
        activations: ActivationSpec | None = None,
        method: str = "rtn",
        kind: str = "linear",
    ) -> QuantizedLinear:
        """Build the layer around a quantized weight [out_features, in_features]."""
        layer = cls(
            tensor.format,
            tensor.shape,
            dtype=tensor.dtype,
            activations=activations,
            device="meta",
            method=method,
            kind=kind,
        )
        layer.set_tensor(tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        if activations is not None:
            layer.activations = ActivationQuantizer(activations, device=tensor.device)
        return layer

    def forward(self, inputs: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """Apply the layer to inputs of any float dtype that the bias has too."""
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        cached = self.float_weight(inputs.dtype)
        rounding = None
        if self.activations is not None:
            if cached is None and self.activations.spec.range is RangeKind.DYNAMIC and inputs.numel():
                rounding = self.activations.spec.format
            else:
                inputs = self.activations(inputs)
        if cached is not None:
            return functional.linear(inputs, cached, bias)
        return linear(inputs, self.tensor, bias, activations=rounding)
