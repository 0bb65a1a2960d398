"""PackedModule: the common part of all modules that hold one quantized weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.formats import format_name
from microscale.kernels import dequantize, is_at_home, to_layout
from microscale.layer_spec import LayerSpec
from microscale.layouts import part_specs
from microscale.layouts.row_major import NAME as ROW_MAJOR
from microscale.nn.modules import KeptDtypes
from microscale.tensor import QuantizedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """The formats of a layer's weight and inputs, in words (``activations``: None where inputs are kept)."""

    weights: str
    activations: str | None = None


PREFIX = "weight_"
"""The parts of the weight are the buffers ``weight_<part>``; those of row_major name the tensors of our files too."""


class PackedModule(KeptDtypes):
    """A module with one packed weight; its bytes are those of the checkpoint, until :meth:`set_layout` moves them.

    The state dict holds the parts of row_major in any layout; in another one they are made for it. A move to a device
    where the backend that owns the layout does not run brings row_major back. Casting the module (``to(dtype)``,
    ``half()``) never touches the packed parts: their dtypes belong to the format. ``method`` records how the codes were
    found, ``kind`` what the module stands for in the model: ``linear``, ``conv1d`` (a linear layer whose float weight
    the model keeps as [in, out]) or ``embedding``. ``requested`` is what a recipe or a file asked for in its own words,
    where that is known; what runs may differ.

    A module may use the weight of another one (:meth:`share`): a head that is tied to its embedding. It has no parts
    then; layout, cached floats and bytes are those of the ``owner``.
    """

    owner: PackedModule | None

    def __init__(self, spec: LayerSpec, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.kind = spec.kind
        self.format = spec.format
        self.shape = spec.shape
        self.weight_dtype = spec.dtype
        self.method = spec.method
        self.requested: Precision | None = None
        self.__dict__["owner"] = None  # beside the children of the module: the weight stands in the model once
        self._layout = ROW_MAJOR
        self._part_names = tuple(part_specs(spec.format, spec.shape))
        self._cached_weight: Tensor | None = None
        self._cached_tensor: QuantizedTensor | None = None
        for name, part in part_specs(spec.format, spec.shape).items():
            self.register_buffer(PREFIX + name, torch.empty(part.shape, dtype=part.dtype, device=device))

    @property
    def holder(self) -> PackedModule:
        """The module that has the parts: the owner, or this one."""
        return self if self.owner is None else self.owner

    @property
    def is_tied(self) -> bool:
        """Whether the weight is that of another module."""
        return self.holder is not self

    @property
    def layout(self) -> str:
        """The name of the memory layout of the weight."""
        return self.holder._layout

    def share(self, owner: PackedModule) -> None:
        """Use the weight of another module, of the same format and shape, in the place of an own one."""
        assert owner.format == self.format and owner.shape == self.shape and not owner.is_tied and owner is not self
        for name in self._part_names:
            delattr(self, PREFIX + name)
        self._part_names = ()
        self._cached_weight = self._cached_tensor = None
        self.__dict__["owner"] = owner

    def layer_spec(self, name: str) -> LayerSpec:
        """Return what the module is, under its name in a model."""
        return LayerSpec(
            name=name, format=self.format, shape=self.shape, dtype=self.weight_dtype, method=self.method, kind=self.kind
        )

    def set_tensor(self, tensor: QuantizedTensor) -> None:
        """Take over the parts and the layout of a quantized tensor of the module's format and shape."""
        assert tensor.format == self.format and tensor.shape == self.shape
        if self.is_tied:
            self.holder.set_tensor(tensor)
            return
        for name in self._part_names:
            if name not in tensor.parts:
                delattr(self, PREFIX + name)
        for name, part in tensor.parts.items():
            self.register_buffer(PREFIX + name, part)
        self._part_names = tuple(tensor.parts)
        self._layout = tensor.layout
        self._cached_weight = None
        self._cached_tensor = None

    def set_layout(self, layout: str) -> None:
        """Lay the weight out anew in the place of the old parts; the numbers stay the same.

        Raises:
            LayoutError: there is no such layout, or it has no place for the format.
        """
        if layout != self.layout:
            self.set_tensor(to_layout(self.tensor, layout))

    @property
    def tensor(self) -> QuantizedTensor:
        """The packed weight in its present layout; it shares memory with the module's buffers."""
        if self.is_tied:
            return self.holder.tensor
        parts = {name: self._part(name) for name in self._part_names}
        cached = self._cached_tensor
        # Loaders put other tensors into the buffers without telling us; then the record is made anew.
        if cached is None or any(cached.parts[name] is not part for name, part in parts.items()):
            cached = QuantizedTensor(
                format=self.format, shape=self.shape, dtype=self.weight_dtype, parts=parts, layout=self.layout
            )
            self._cached_tensor = cached
        return cached

    @property
    def num_bytes(self) -> int:
        """Bytes that a file holds for the weight and for what works beside it at run time, whatever the layout.

        A bias does not count. The weight of another module does, for it is read here too; :func:`packed_size` counts it
        once.
        """
        specs = part_specs(self.format, self.shape).values()
        return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)

    def _part(self, name: str) -> Tensor:
        part = self._buffers[PREFIX + name]
        assert part is not None
        return part

    @property
    def weight(self) -> Float[Tensor, "..."]:
        """The dequantized weight, made anew at every access unless it is kept; on ``meta`` as empty as the parts."""
        cached = self.holder._cached_weight
        if cached is not None:
            return cached
        if self.tensor.device.type == "meta":
            return torch.empty(self.shape, dtype=self.weight_dtype, device="meta")
        return dequantize(self.tensor)

    def float_weight(self, dtype: torch.dtype) -> Float[Tensor, "..."] | None:
        """Return the weight that :func:`cached_weights` keeps in a float dtype, or None outside of it."""
        holder = self.holder
        if holder._cached_weight is not None and holder._cached_weight.dtype != dtype:
            holder._cached_weight = dequantize(self.tensor, dtype)
        return holder._cached_weight

    def cache_weight(self, dtype: torch.dtype | None = None) -> None:
        """Dequantize once, to a float dtype (None: the one the weight had), until :meth:`drop_cached_weight`."""
        self.holder._cached_weight = dequantize(self.tensor, dtype or self.weight_dtype)

    def drop_cached_weight(self) -> None:
        """Forget the float weight."""
        self.holder._cached_weight = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout == ROW_MAJOR or self.is_tied:
            return
        for name in self._part_names:
            del destination[prefix + PREFIX + name]
        for name, part in to_layout(self.tensor, ROW_MAJOR).parts.items():
            destination[prefix + PREFIX + name] = part

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        if self.is_tied:
            super()._load_from_state_dict(*args, **keywords)
            return
        layout = self.layout
        self.set_layout(ROW_MAJOR)
        super()._load_from_state_dict(*args, **keywords)
        self._cached_weight = None
        self.set_layout(layout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        if self.layout != ROW_MAJOR and not self.is_tied:
            before = self.tensor.device
            device = fn(torch.empty(0, dtype=torch.uint8, device=before)).device
            if device != before and not is_at_home(self.layout, self.format, self.weight_dtype, device):
                self.set_layout(ROW_MAJOR)
        super()._apply(fn, recurse)
        self._cached_weight = None
        self._cached_tensor = None
        return self

    def extra_repr(self) -> str:
        return f"{'x'.join(str(length) for length in self.shape)}, {format_name(self.format)}"
