"""What a checkpoint says about its quantized layers, and the interface that every file layout implements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from microscale.formats import BlockFormat, Format, Overflow
from microscale.layer_spec import LayerSpec
from microscale.tensor import QuantizedTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Dtype and shape of a tensor in a file, known without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data in bytes."""
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


class FileLayout(Protocol):
    """A way to lay quantized layers into named tensors of a file, with its ``quantization_config``."""

    @property
    def name(self) -> str:
        """The word of ``--layout`` and of messages."""
        ...

    def refusal(self, layer: LayerSpec) -> str | None:
        """Return why this layout cannot hold a layer, or None where it can."""
        ...

    def pack(self, layer: LayerSpec, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Return the tensors of a layer under their full names in the file."""
        ...

    def config(self, layers: Sequence[LayerSpec], unquantized: Sequence[str]) -> dict[str, Any]:
        """Return the ``quantization_config`` of config.json; ``unquantized`` names the linear modules left alone."""
        ...

    def stored_layers(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], dtype: torch.dtype
    ) -> dict[str, LayerSpec]:
        """Return the quantized layers of a file by module name, from ``quantization_config`` and tensor headers.

        Raises:
            CheckpointError: a config that we cannot read, or tensors that contradict it.
        """
        ...

    def unpack(self, layer: LayerSpec, load: Callable[[str], Tensor]) -> QuantizedTensor:
        """Read a layer; ``load`` returns a tensor by its name in the file."""
        ...

    def tensor_names(self, layer: LayerSpec) -> list[str]:
        """Return the names of the tensors that :meth:`unpack` reads."""
        ...


def has_bytes_of(fmt: Format, base: BlockFormat) -> bool:
    """Whether bytes of a format mean what they mean in ``base``, whatever rule and rounding made them."""
    if not isinstance(fmt, BlockFormat) or fmt.rule.multiplier != 1 or fmt.overflow is not Overflow.SATURATE:
        return False
    return _stored_fields(fmt) == _stored_fields(base)


def _stored_fields(fmt: BlockFormat) -> tuple[object, ...]:
    """Return the fields of a format that decide how its bits are read."""
    levels = (fmt.tensor_scale, fmt.sub_scale, fmt.zero_point, fmt.extension, fmt.sparse)
    return (fmt.element, fmt.block, fmt.scale, *levels)


def online_refusal(layer: LayerSpec) -> str | None:
    """Return why a layout that holds only weights and formats cannot hold a layer, or None."""
    if layer.transforms:
        return f"it has no place for online transforms ({', '.join(str(spec) for spec in layer.transforms)})"
    return "it has no place for a low-rank side path" if layer.low_rank else None
