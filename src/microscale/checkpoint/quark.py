"""The layout of AMD Quark for MXFP4, MXFP6 and MXFP8: what vLLM, and transformers with amd-quark installed, load.

Facts of that layout (amd-quark 0.13, vLLM 0.33): ``X.weight`` holds the codes of row_major (uint8 [rows, cols / 2]
for fp4, uint8 [rows, 3 * cols / 4] for fp6, float8_e4m3fn [rows, cols] for fp8) and ``X.weight_scale`` the E8M0
codes (uint8 [rows, cols / 32]). ``quantization_config`` names one scheme for all linears, others by layer name, and
the linears left alone. It records the scale rule as ``scale_calculation_mode``: even (also where it is null), floor
or ceil; elements round to nearest even.

MXFP8 weights are written as blocks of 1x32 (``per_block``): that is the spelling both Quark and vLLM read. Quark
itself can neither export nor load fp8 weights as ``per_group``, the spelling of fp4 and fp6; we read both.

Left out: per-tensor fp8 and integer schemes, quantized outputs, biases and KV caches, rotations, MX6 and MX9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from microscale.checkpoint.quark_config import (
    BLOCK_SIZE,
    LIBRARY_VERSION,
    RULES,
    LayerEntries,
    TensorUse,
    check_scope,
    mode_of,
    read_tensor_entry,
    tensor_entry,
    weight_scheme,
)
from microscale.checkpoint.schema import TensorInfo, online_refusal
from microscale.errors import CheckpointError
from microscale.formats import ActivationSpec, BlockFormat, Format, RangeKind, format_name
from microscale.layer_spec import LayerSpec
from microscale.layouts import row_bytes
from microscale.tensor import QuantizedTensor

QUANT_METHOD = "quark"
_LAYER_TENSORS = frozenset({"weight", "weight_scale", "bias"})


def _activation_refusal(spec: ActivationSpec) -> str | None:
    fmt = spec.format
    scheme = weight_scheme(fmt)
    if scheme is None or spec.range is not RangeKind.DYNAMIC:
        return f"Quark quantizes activations dynamically to MXFP4, MXFP6 or MXFP8 E4M3, not to {spec}"
    assert isinstance(fmt, BlockFormat)
    if mode_of(fmt) is None:
        return (
            f"Quark's scale rules are {', '.join(RULES)}, not {fmt.rule}; name one for the activations, such as"
            f" {format_name(scheme.base)}"
        )
    if replace(fmt, rule=scheme.base.rule) != scheme.base:
        return f"Quark rounds activations to nearest even and passes NaN and Inf on as NaN, unlike {spec}"
    return None


class QuarkLayout:
    """The layout ``quark``; see :class:`microscale.checkpoint.schema.FileLayout` for the methods."""

    name = "quark"

    def refusal(self, layer: LayerSpec) -> str | None:
        """Hold MXFP4, MXFP6 and MXFP8 E4M3 linears of whole blocks, with no or dynamic activations of these formats.

        The weights may come from any scale rule and rounding (null is written where Quark has no word for it);
        activations are quantized when the model runs, so theirs must be rules that Quark has.
        """
        online = online_refusal(layer)
        if online is not None:
            return f"quark: {online}"
        if weight_scheme(layer.format) is None:
            return (
                f"quark holds MXFP4, MXFP6 and MXFP8 E4M3 with blocks of {BLOCK_SIZE}, not {format_name(layer.format)}"
            )
        if layer.kind != "linear" or len(layer.shape) != 2:
            return f"quark holds linear layers, not a quantized {layer.kind} of shape {list(layer.shape)}"
        if layer.shape[1] % BLOCK_SIZE:
            return f"quark needs whole blocks, but the width {layer.shape[1]} is not a multiple of {BLOCK_SIZE}"
        return None if layer.activations is None else _activation_refusal(layer.activations)

    def pack(self, layer: LayerSpec, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Name codes and scales: the same bytes."""
        scheme = weight_scheme(layer.format)
        assert scheme is not None
        return {
            f"{layer.name}.weight": tensor.parts["codes"].view(scheme.stored),
            f"{layer.name}.weight_scale": tensor.parts["scale"],
        }

    def config(self, layers: Sequence[LayerSpec], unquantized: Sequence[str]) -> dict[str, Any]:
        """Write the most frequent scheme as the global one and every other layer by its name."""
        groups: dict[tuple[Format, ActivationSpec | None], list[LayerSpec]] = {}
        for layer in layers:
            groups.setdefault((layer.format, layer.activations), []).append(layer)
        main = max(groups.values(), key=len)
        others = [layer for members in groups.values() if members is not main for layer in members]
        return {
            "quant_method": QUANT_METHOD,
            "quant_mode": "eager_mode",
            "version": LIBRARY_VERSION,
            "algo_config": None,
            "softmax_quant_spec": None,
            "exclude": list(unquantized),
            "global_quant_config": _layer_entry(main[0]),
            "layer_type_quant_config": {},
            "layer_quant_config": {layer.name: _layer_entry(layer) for layer in others},
            "kv_cache_quant_config": {},
            "kv_cache_post_rope": False,
            "export": {
                "kv_cache_group": [],
                "min_kv_scale": 0.0,
                "pack_method": "reorder",
                "weight_format": "real_quantized",
                "weight_merge_groups": None,
            },
        }

    def stored_layers(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], dtype: torch.dtype
    ) -> dict[str, LayerSpec]:
        """Find the quantized layers by their scales and match each with its scheme, by Quark's order of precedence."""
        check_scope(config)
        entries = LayerEntries.of(config)
        layers: dict[str, LayerSpec] = {}
        for name in sorted(infos):
            if name.endswith(".weight_scale"):
                layer_name = name.removesuffix(".weight_scale")
                layers[layer_name] = _stored_layer(layer_name, entries.of_layer(layer_name), infos, dtype)
        if not layers:
            raise CheckpointError("quark config, but no tensor named *.weight_scale; the file is not quantized")
        _check_tensors(layers, infos)
        return layers

    def unpack(self, layer: LayerSpec, load: Callable[[str], Tensor]) -> QuantizedTensor:
        """Read codes and scales as parts of our layout: the same bytes."""
        parts = {
            "codes": load(f"{layer.name}.weight").view(torch.uint8),
            "scale": load(f"{layer.name}.weight_scale").view(torch.uint8),
        }
        return QuantizedTensor(format=layer.format, shape=layer.shape, dtype=layer.dtype, parts=parts)

    def tensor_names(self, layer: LayerSpec) -> list[str]:
        """Name the two tensors of a layer."""
        return [f"{layer.name}.weight", f"{layer.name}.weight_scale"]


def _layer_entry(layer: LayerSpec) -> dict[str, Any]:
    return {
        "input_tensors": None
        if layer.activations is None
        else tensor_entry(layer.activations.format, TensorUse.ACTIVATIONS),
        "output_tensors": None,
        "weight": tensor_entry(layer.format, TensorUse.WEIGHTS),
        "bias": None,
        "target_device": None,
    }


def _stored_layer(
    name: str, entry: Mapping[str, Any], infos: Mapping[str, TensorInfo], dtype: torch.dtype
) -> LayerSpec:
    for key in ("output_tensors", "bias"):
        if entry.get(key) is not None:
            raise CheckpointError(f"layer {name!r}: quantized {key} of quark are not read, got {entry[key]!r}")
    scheme, fmt = read_tensor_entry(name, entry.get("weight"), TensorUse.WEIGHTS)
    inputs = entry.get("input_tensors")
    activations = (
        None if inputs is None else ActivationSpec(format=read_tensor_entry(name, inputs, TensorUse.ACTIVATIONS)[1])
    )
    info = infos.get(f"{name}.weight")
    if info is None or len(info.shape) != 2 or info.dtype != scheme.stored:
        found = "no tensor" if info is None else f"{info.dtype} {list(info.shape)}"
        raise CheckpointError(
            f"layer {name!r}: {scheme.word} weights are a matrix of {scheme.stored}, got {found}; the checkpoint is"
            " damaged"
        )
    rows, stored_cols = info.shape
    cols = stored_cols * 8 // scheme.base.element.bits
    scale = infos[f"{name}.weight_scale"]
    is_whole = cols > 0 and cols % BLOCK_SIZE == 0 and row_bytes(cols, scheme.base.element.bits) == stored_cols
    if not is_whole or scale.shape != (rows, cols // BLOCK_SIZE):
        raise CheckpointError(
            f"layer {name!r}: a {scheme.word} weight stored as {[rows, stored_cols]} needs scales for whole blocks of"
            f" {BLOCK_SIZE}, got {list(scale.shape)}; the checkpoint is damaged"
        )
    if scale.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise CheckpointError(f"layer {name!r}: E8M0 scales are stored as uint8, got {scale.dtype}")
    return LayerSpec(name=name, format=fmt, shape=(rows, cols), dtype=dtype, activations=activations, method="unknown")


def _check_tensors(layers: Mapping[str, LayerSpec], infos: Mapping[str, TensorInfo]) -> None:
    """Refuse packed weights without scales, and tensors of a quantized layer that would change its result."""
    for name, info in infos.items():
        layer_name, _, own = name.rpartition(".")
        if layer_name in layers and own not in _LAYER_TENSORS:
            raise CheckpointError(
                f"tensor {name!r} belongs to a quantized layer, but microscale reads weights, scales and biases only;"
                " rotations, static ranges and low-rank corrections of quark are not supported"
            )
        if own == "weight" and info.dtype in (torch.uint8, torch.float8_e4m3fn) and layer_name not in layers:
            raise CheckpointError(f"layer {layer_name!r} has packed weights, but {layer_name}.weight_scale is missing")


def is_held_by_entry(fmt: Format, recorded: Format) -> bool:
    """Whether a file of this layout that reads as ``fmt`` may hold the bits of ``recorded``."""
    scheme = weight_scheme(recorded)
    return scheme is not None and scheme == weight_scheme(fmt)
