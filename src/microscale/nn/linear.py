"""QuantizedLinear: a linear layer with a packed weight and, on request, transformed and quantized inputs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from microscale.formats import ActivationSpec, Format, RangeKind
from microscale.kernels import BACKENDS, Operation, linear, preferred_layout
from microscale.kernels.dispatch import note_executions
from microscale.layer_spec import LayerSpec
from microscale.nn.activation import ActivationQuantizer
from microscale.nn.gradients import GradientWatch
from microscale.nn.online import InputTransforms, LowRank
from microscale.nn.packed import PackedModule
from microscale.tensor import QuantizedTensor
from microscale.transforms import Transform


class QuantizedLinear(PackedModule):
    """y = quantize(x M) @ W.T + bias + low_rank(x M), W [out_features, in_features] packed, in the dtype of x.

    M is the product of ``transforms``, which the weight has been through too; without them it is the identity. The
    low-rank side path sees the transformed inputs before they are rounded.
    """

    bias: nn.Parameter | None
    activations: ActivationQuantizer | None
    transforms: InputTransforms | None
    low_rank: LowRank | None

    def __init__(self, spec: LayerSpec, *, device: torch.device | str | None = None) -> None:
        super().__init__(spec, device=device)
        self.out_features, self.in_features = spec.shape
        dtype, activations, low_rank = spec.dtype, spec.activations, spec.low_rank
        empty = torch.empty(self.out_features, dtype=dtype, device=device) if spec.has_bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))
        self.activations = None if activations is None else ActivationQuantizer(activations, device=device)
        self.transforms = InputTransforms(spec.transforms, self.in_features, device=device) if spec.transforms else None
        self.low_rank = LowRank(low_rank, self.in_features, self.out_features, device=device) if low_rank else None
        self.inference_dtype: torch.dtype | None = None
        self.inference_device: torch.device | None = None
        self.watch: GradientWatch | None = None

    @classmethod
    def from_tensor(
        cls,
        tensor: QuantizedTensor,
        *,
        bias: Tensor | None = None,
        activations: ActivationSpec | None = None,
        method: str = "rtn",
        kind: str = "linear",
        transforms: Sequence[Transform] = (),
        low_rank: tuple[Tensor, Tensor] | None = None,
    ) -> QuantizedLinear:
        """Build the layer around a quantized weight [out_features, in_features]; ``low_rank`` is (down, up)."""
        spec = LayerSpec(
            name="", format=tensor.format, shape=tensor.shape, dtype=tensor.dtype, method=method, kind=kind
        )
        layer = cls(spec, device="meta")
        layer.set_tensor(tensor)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        if activations is not None:
            layer.activations = ActivationQuantizer(activations, device=tensor.device)
        if transforms:
            layer.transforms = InputTransforms.from_transforms(transforms)
        if low_rank is not None:
            layer.low_rank = LowRank.from_factors(*low_rank)
        return layer

    def layer_spec(self, name: str) -> LayerSpec:
        """Return what the module is, under its name in a model."""
        return dataclasses.replace(
            super().layer_spec(name),
            activations=None if self.activations is None else self.activations.spec,
            transforms=() if self.transforms is None else self.transforms.specs,
            low_rank=0 if self.low_rank is None else self.low_rank.rank,
            has_bias=self.bias is not None,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes that a file holds for the weight and for what works online, bias left out."""
        online = [part.num_bytes for part in (self.transforms, self.low_rank) if part is not None]
        return super().num_bytes + sum(online)

    @property
    def weight(self) -> Float[Tensor, "..."]:
        """The float matrix W of y = x W.T that the layer stands for, made anew at every access.

        It maps the layer's own inputs: transforms and the low-rank side path are in it, the rounding of inputs is not.
        Of a ``conv1d`` it is [in, out], as the model keeps it. Models that multiply by a weight themselves get this.
        """
        weight = super().weight
        if weight.is_meta:
            return weight.T if self.kind == "conv1d" else weight
        if self.low_rank is not None:
            weight = weight + (self.low_rank.up @ self.low_rank.down).to(weight.dtype)
        if self.transforms is not None:
            unit = torch.eye(self.in_features, device=weight.device)
            weight = (weight.to(torch.float32) @ self.transforms(unit).T).to(weight.dtype)
        return weight.T if self.kind == "conv1d" else weight

    @property
    def rounding(self) -> Format | None:
        """The format that ``linear`` itself rounds the inputs to; inputs with a range of another kind come rounded."""
        spec = None if self.activations is None else self.activations.spec
        return spec.format if spec is not None and spec.range is RangeKind.DYNAMIC else None

    def prepare(self, dtype: torch.dtype) -> bool:
        """Lay the weight out as the fastest kernel for inputs of ``dtype`` reads it; returns whether that changed it.

        From then on every move to another device, and every cast, does so for the new device and dtype.
        """
        self.inference_dtype, self.inference_device = dtype, self.tensor.device
        before = self.layout
        self.set_layout(preferred_layout(self.tensor, dtype, activations=self.rounding))
        return self.layout != before

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        before = (self.inference_dtype, self.inference_device)
        super()._apply(fn, recurse)
        if self.inference_dtype is not None:
            dtype = fn(torch.empty(0, dtype=self.inference_dtype, device=self.inference_device)).dtype
            if (dtype, self.tensor.device) != before:
                self.prepare(dtype)
        return self

    def forward(self, inputs: Float[Tensor, "... in_features"]) -> Float[Tensor, "... out_features"]:
        """Apply the layer to inputs of any float dtype that the bias has too."""
        if self.transforms is not None:
            inputs = self.transforms(inputs)
        outputs = self._product(inputs)
        return outputs if self.low_rank is None else outputs + self.low_rank(inputs)

    def _product(self, inputs: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        cached = self.float_weight(inputs.dtype)
        rounding = None
        if self.activations is not None:
            rounding = self.rounding if cached is None and inputs.numel() else None
            if rounding is None:
                inputs = self.activations(inputs)
        if cached is not None:
            note_executions(Counter({(Operation.LINEAR, BACKENDS[-1].name): 1}))  # its own way, unpacked once
            return functional.linear(inputs, cached, bias)
        if self.watch is not None:
            self.watch.look(self.tensor, inputs, bias, rounding)
        return linear(inputs, self.tensor, bias, activations=rounding)
