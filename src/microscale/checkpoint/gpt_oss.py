"""The layout of gpt-oss (``quant_method: "mxfp4"``): experts in MXFP4, everything else in bfloat16.

Facts of that layout: ``X.gate_up_proj_blocks`` uint8 [experts, rows, column blocks, 16] and ``X.gate_up_proj_scales``
uint8 [experts, rows, column blocks], the same for ``down_proj``; two codes a byte, low nibble first: the bytes of
row_major. Rows of gate_up_proj alternate between gate and up. Where transformers dequantizes, its parameter has the
axes [experts, cols, rows]; a :class:`~microscale.checkpoint.schema.LayerSpec` keeps [experts, rows, cols].

A model in memory has the experts one by one; who writes stacks them first. The scale of a block may come from any rule:
the file does not say which.

Scale 255 is NaN as in OCP MX; transformers reads 2^128 there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from microscale.checkpoint.schema import TensorInfo, has_bytes_of, online_refusal
from microscale.errors import CheckpointError
from microscale.formats import BlockFormat, Format, format_name, parse_format
from microscale.layer_spec import LayerSpec
from microscale.tensor import QuantizedTensor

QUANT_METHOD = "mxfp4"
BLOCK_SIZE = 32
BLOCK_BYTES = 16

_BLOCKS, _SCALES = "_blocks", "_scales"
_MXFP4 = parse_format("mxfp4")
_EXPERT = re.compile(r"(.*\.)?experts\.\d+\.(gate_proj|up_proj|down_proj)")
_LEFT = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")
"""What the published files say is not converted."""


class GptOssLayout:
    """The layout ``gpt-oss``; see :class:`microscale.checkpoint.schema.FileLayout` for the methods."""

    name = "gpt-oss"

    def refusal(self, layer: LayerSpec) -> str | None:
        """Hold the MXFP4 weights of experts, of whole blocks, as stacks or one by one; inputs stay as they are."""
        online = online_refusal(layer)
        if online is not None:
            return f"gpt-oss: {online}"
        if layer.kind != "experts" and (layer.kind != "linear" or _EXPERT.fullmatch(layer.name) is None):
            return "gpt-oss holds experts alone; every other layer stays in bfloat16"
        if not is_held_by_blocks(_MXFP4, layer.format):
            return f"gpt-oss holds MXFP4, not {format_name(layer.format)}; use --format mxfp4"
        if layer.activations is not None:
            return f"gpt-oss has no place for the rounding of inputs ({layer.activations}); leave --activations out"
        if layer.shape[-1] % BLOCK_SIZE:
            return f"gpt-oss needs whole blocks, but the width {layer.shape[-1]} is not a multiple of {BLOCK_SIZE}"
        return None

    def pack(self, layer: LayerSpec, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Lay out the blocks and scales of a stack of experts: the same bytes."""
        assert layer.kind == "experts"
        scales = tensor.parts["scale"].unflatten(0, (layer.shape[0], -1))
        return {
            layer.name + _BLOCKS: tensor.parts["codes"].reshape(*scales.shape, BLOCK_BYTES),
            layer.name + _SCALES: scales,
        }

    def config(self, layers: Sequence[LayerSpec], unquantized: Sequence[str]) -> dict[str, Any]:
        """Write what the published files say, and the name of whatever else was left alone."""
        others = [name for name in unquantized if not any(_is_inside(name, pattern) for pattern in _LEFT)]
        return {"quant_method": QUANT_METHOD, "modules_to_not_convert": [*_LEFT, *others]}

    def stored_layers(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], dtype: torch.dtype
    ) -> dict[str, LayerSpec]:
        """Find the experts by their blocks; the config says nothing more about them."""
        for name in infos:
            if name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS not in infos:
                raise CheckpointError(f"tensor {name!r} has no {_BLOCKS} beside it; the checkpoint is incomplete")
        names = sorted(name.removesuffix(_BLOCKS) for name in infos if name.endswith(_BLOCKS))
        if not names:
            raise CheckpointError("gpt-oss config, but no tensor named *_blocks; the file is not quantized")
        return {name: _stored_layer(name, infos, dtype) for name in names}

    def unpack(self, layer: LayerSpec, load: Callable[[str], Tensor]) -> QuantizedTensor:
        """Read blocks and scales as parts of our layout: the same bytes, all experts' rows under each other."""
        parts = {
            "codes": load(layer.name + _BLOCKS).flatten(2).flatten(0, 1),
            "scale": load(layer.name + _SCALES).flatten(0, 1),
        }
        return QuantizedTensor(format=layer.format, shape=layer.shape, dtype=layer.dtype, parts=parts)

    def tensor_names(self, layer: LayerSpec) -> list[str]:
        """Name the two tensors of a layer."""
        return [layer.name + _BLOCKS, layer.name + _SCALES]


def is_held_by_blocks(fmt: Format, recorded: Format) -> bool:
    """Whether a file of this layout, which reads as ``fmt``, may hold the bits of ``recorded``."""
    assert isinstance(fmt, BlockFormat)
    return has_bytes_of(recorded, fmt)


def _is_inside(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _stored_layer(name: str, infos: Mapping[str, TensorInfo], dtype: torch.dtype) -> LayerSpec:
    blocks, scales = infos[name + _BLOCKS], infos.get(name + _SCALES)
    if scales is None:
        raise CheckpointError(f"tensor {name + _SCALES!r} is missing; the checkpoint is incomplete")
    for info, suffix in ((blocks, _BLOCKS), (scales, _SCALES)):
        if info.dtype != torch.uint8:
            raise CheckpointError(
                f"tensor {name + suffix!r} must be uint8, got {info.dtype}; the checkpoint is damaged"
            )
    if len(blocks.shape) != 4 or blocks.shape[-1] != BLOCK_BYTES or scales.shape != blocks.shape[:-1]:
        raise CheckpointError(
            f"{name}: blocks must be [experts, rows, column blocks, {BLOCK_BYTES}] with a scale for each block, got"
            f" {list(blocks.shape)} and {list(scales.shape)}; the checkpoint is damaged"
        )
    experts, rows, column_blocks = scales.shape
    return LayerSpec(
        name=name,
        format=_MXFP4,
        shape=(experts, rows, column_blocks * BLOCK_SIZE),
        dtype=dtype,
        method="unknown",
        kind="experts",
    )
