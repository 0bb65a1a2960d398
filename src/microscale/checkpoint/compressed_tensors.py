"""The layout of compressed-tensors for MXFP4, MXFP8 and NVFP4: what stock transformers and vLLM load.

Facts of that layout (library version 0.20): ``X.weight_packed`` (uint8, two codes a byte, low nibble first) or
``X.weight`` (float8_e4m3fn), ``X.weight_scale`` (uint8 E8M0, or float8_e4m3fn for NVFP4) and
``X.weight_global_scale`` (float32, the divisor that we call tensor_inv_scale). The scale rule of weights is free;
activations follow the library's own rule, which is ``even`` at one mantissa bit for both MX element types. NVFP4 inputs
have ``X.input_global_scale`` (float32), measured beforehand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.checkpoint.schema import TensorInfo, has_bytes_of, online_refusal
from microscale.errors import CheckpointError
from microscale.formats import (
    ALIASES,
    ActivationSpec,
    BlockFormat,
    Format,
    RangeKind,
    VectorBlock,
    format_name,
    parse_activation,
    parse_format,
)
from microscale.formats.elements import E2M1, E4M3
from microscale.layer_spec import LayerSpec
from microscale.tensor import QuantizedTensor

QUANT_METHOD = "compressed-tensors"
LIBRARY_VERSION = "0.20.0"

ACTIVATION_EQUIVALENTS: Mapping[str, ActivationSpec] = MappingProxyType(
    {
        "mxfp4": parse_activation("mxfp4:even"),
        "mxfp8_e4m3": parse_activation("mxfp8:even(1)"),
        "nvfp4": parse_activation("nvfp4@static"),
    }
)
"""What a named format means for activations under this layout: the library rounds amax half up at one mantissa bit, and
the tensor's scale of NVFP4 inputs is measured beforehand (``input_global_scale``).
"""


def layout_inputs(word: str) -> ActivationSpec | None:
    """Return what a named format means for inputs in the layout of compressed-tensors; None: what it says."""
    return ACTIVATION_EQUIVALENTS.get(ALIASES.get(word, word))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scheme:
    """One element type of the layout: its format string, arguments, tensors and the format that reads it back."""

    file_format: str
    arguments: Mapping[str, Any]
    base: str
    packed: bool


_GROUP32 = {"strategy": "group", "group_size": 32, "symmetric": True, "type": "float", "scale_dtype": "torch.uint8"}
_GROUP16 = {
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "type": "float",
    "scale_dtype": "torch.float8_e4m3fn",
}
_SCHEMES = (
    _Scheme(file_format="mxfp4-pack-quantized", arguments={"num_bits": 4, **_GROUP32}, base="mxfp4:even", packed=True),
    _Scheme(file_format="mxfp8-quantized", arguments={"num_bits": 8, **_GROUP32}, base="mxfp8:even(1)", packed=False),
    _Scheme(file_format="nvfp4-pack-quantized", arguments={"num_bits": 4, **_GROUP16}, base="nvfp4", packed=True),
)


_STATIC_NVFP4 = parse_activation("nvfp4@static")
_NVFP4_NUMERATOR = E4M3.max_value * E2M1.max_value


def _weight_scheme(fmt: Format) -> _Scheme | None:
    """Return the scheme whose tensors hold a format's codes and scales, whatever rule and rounding made them."""
    return next((scheme for scheme in _SCHEMES if has_bytes_of(fmt, _base(scheme))), None)


def _base(scheme: _Scheme) -> BlockFormat:
    """Return the format that reads a scheme back."""
    base = parse_format(scheme.base)
    assert isinstance(base, BlockFormat)
    return base


def _activation_arguments(spec: ActivationSpec) -> dict[str, Any] | None:
    for scheme in _SCHEMES[:2]:
        if spec == parse_activation(scheme.base):
            return {**scheme.arguments, "dynamic": True}
    return {**_GROUP16, "num_bits": 4, "dynamic": "local"} if spec == _STATIC_NVFP4 else None


INPUT_SCALE = "input_global_scale"
"""The tensor of a layer that holds 2688 over the largest NVFP4 input of the calibration."""


def input_global_scale(amax: Float[Tensor, "1"]) -> Float[Tensor, "1"]:
    """Return the number that is stored of a range: (1 / amax) * 2688, 1 where nothing was seen (NaN) or all was 0."""
    scale = amax.reshape(1).to(torch.float32).reciprocal() * _NVFP4_NUMERATOR
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)


def input_range(scale: Float[Tensor, "1"]) -> Float[Tensor, "1"]:
    """Return the range that :func:`input_global_scale` makes this very number of; the next one where none does."""
    nearest = (_NVFP4_NUMERATOR / scale).view(torch.int32)
    for step in (0, 1, -1, 2, -2):
        amax = (nearest + step).view(torch.float32)
        if bool(input_global_scale(amax) == scale):
            return amax
    return nearest.view(torch.float32)


class CompressedTensorsLayout:
    """The layout ``compressed-tensors``; see :class:`microscale.checkpoint.schema.FileLayout` for the methods."""

    name = "compressed-tensors"

    def refusal(self, layer: LayerSpec) -> str | None:
        """Hold MXFP4, MXFP8 and NVFP4 linears of whole blocks; inputs as they are, MXFP4, MXFP8 or static NVFP4."""
        online = online_refusal(layer)
        if online is not None:
            return f"compressed-tensors: {online}"
        scheme = _weight_scheme(layer.format)
        if scheme is None:
            return f"compressed-tensors holds MXFP4, MXFP8 E4M3 and NVFP4, not {format_name(layer.format)}"
        if layer.kind != "linear" or len(layer.shape) != 2:
            return f"compressed-tensors holds linear layers, not a quantized {layer.kind}"
        assert isinstance(layer.format, BlockFormat) and isinstance(layer.format.block, VectorBlock)
        if layer.shape[1] % layer.format.block.size:
            return (
                f"compressed-tensors needs whole blocks, but the width {layer.shape[1]} is not a multiple of"
                f" {layer.format.block.size}"
            )
        if layer.activations is not None and _activation_arguments(layer.activations) is None:
            known = ", ".join([*(scheme.base for scheme in _SCHEMES[:2]), str(_STATIC_NVFP4)])
            return f"compressed-tensors quantizes activations by its own rules ({known}), not {layer.activations}"
        return None

    def pack(self, layer: LayerSpec, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Lay out codes, scales and the tensor's divisor."""
        scheme = _weight_scheme(layer.format)
        assert scheme is not None
        codes, scale = tensor.parts["codes"], tensor.parts["scale"]
        if scheme.packed:
            tensors = {f"{layer.name}.weight_packed": codes}
        else:
            tensors = {f"{layer.name}.weight": codes.view(torch.float8_e4m3fn)}
        inverse = tensor.parts.get("tensor_inv_scale")
        tensors[f"{layer.name}.weight_scale"] = scale if inverse is None else scale.view(torch.float8_e4m3fn)
        if inverse is not None:
            tensors[f"{layer.name}.weight_global_scale"] = inverse
        return tensors

    def config(self, layers: Sequence[LayerSpec], unquantized: Sequence[str]) -> dict[str, Any]:
        """Write one group for each pair of weight and activation scheme; a single group targets all linears."""
        groups: dict[tuple[str, str], list[LayerSpec]] = {}
        for layer in layers:
            scheme = _weight_scheme(layer.format)
            assert scheme is not None
            groups.setdefault((scheme.file_format, str(layer.activations)), []).append(layer)
        entries: dict[str, Any] = {}
        for number, members in enumerate(groups.values()):
            targets = ["Linear"] if len(groups) == 1 else [layer.name for layer in members]
            entries[f"group_{number}"] = _group_entry(members[0], targets)
        formats = {entry["format"] for entry in entries.values()}
        return {
            "quant_method": QUANT_METHOD,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": entries,
            "ignore": list(unquantized),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "version": LIBRARY_VERSION,
        }

    def stored_layers(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], dtype: torch.dtype
    ) -> dict[str, LayerSpec]:
        """Find the quantized layers by their scales and match each with its group."""
        status = config.get("quantization_status")
        if status != "compressed":
            raise CheckpointError(
                f"compressed-tensors with quantization_status {status!r} cannot be read, only 'compressed'"
            )
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError("quantization_config of compressed-tensors has no config_groups")
        for key, group in cast("dict[str, Any]", groups).items():
            if not isinstance(group, dict) or not isinstance(cast("dict[str, Any]", group).get("targets"), list):
                raise CheckpointError(f"config group {key!r} must be an object with a list of targets, got {group!r}")
        layers: dict[str, LayerSpec] = {}
        for name in sorted(infos):
            if name.endswith(".weight_scale"):
                layer_name = name.removesuffix(".weight_scale")
                group = _match_group(layer_name, cast("dict[str, Any]", groups))
                layers[layer_name] = _stored_layer(layer_name, group, config, infos, dtype)
        if not layers:
            raise CheckpointError(
                "compressed-tensors config, but no tensor named *.weight_scale; the file is not quantized"
            )
        return layers

    def unpack(self, layer: LayerSpec, load: Callable[[str], Tensor]) -> QuantizedTensor:
        """Read codes, scales and divisor as parts of our layout: the same bytes."""
        scheme = _weight_scheme(layer.format)
        assert scheme is not None
        codes = load(f"{layer.name}.{'weight_packed' if scheme.packed else 'weight'}").view(torch.uint8)
        parts = {"codes": codes, "scale": load(f"{layer.name}.weight_scale").view(torch.uint8)}
        assert isinstance(layer.format, BlockFormat)
        if layer.format.tensor_scale is not None:
            parts["tensor_inv_scale"] = load(f"{layer.name}.weight_global_scale").reshape(1).to(torch.float32)
        return QuantizedTensor(format=layer.format, shape=layer.shape, dtype=layer.dtype, parts=parts)

    def tensor_names(self, layer: LayerSpec) -> list[str]:
        """Name the two or three tensors of a layer."""
        scheme = _weight_scheme(layer.format)
        assert scheme is not None and isinstance(layer.format, BlockFormat)
        names = ["weight_packed" if scheme.packed else "weight", "weight_scale"]
        if layer.format.tensor_scale is not None:
            names.append("weight_global_scale")
        return [f"{layer.name}.{name}" for name in names]


def _group_entry(layer: LayerSpec, targets: list[str]) -> dict[str, Any]:
    scheme = _weight_scheme(layer.format)
    assert scheme is not None
    return {
        "format": scheme.file_format,
        "targets": targets,
        "weights": {**scheme.arguments, "dynamic": False},
        "input_activations": None if layer.activations is None else _activation_arguments(layer.activations),
        "output_activations": None,
    }


def _match_group(name: str, groups: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the group of a layer: its exact name before a regex, a regex before the class name."""
    by_rank: dict[int, Mapping[str, Any]] = {}
    for group in groups.values():
        for target in group["targets"]:
            rank = _target_rank(name, str(target))
            if rank is not None:
                by_rank.setdefault(rank, group)
    if not by_rank:
        raise CheckpointError(f"no config group of compressed-tensors matches the quantized layer {name!r}")
    return by_rank[min(by_rank)]


def _target_rank(name: str, target: str) -> int | None:
    if target == name:
        return 0
    if target.startswith("re:"):
        try:
            return 1 if re.match(target.removeprefix("re:"), name) else None
        except re.error as error:
            raise CheckpointError(f"config group target {target!r} is no regular expression: {error}") from None
    return 2 if target == "Linear" else None


def _stored_layer(
    name: str, group: Mapping[str, Any], config: Mapping[str, Any], infos: Mapping[str, TensorInfo], dtype: torch.dtype
) -> LayerSpec:
    file_format = group.get("format") or config.get("format")
    scheme = _scheme_of(name, file_format, group.get("weights"))
    info = infos.get(f"{name}.{'weight_packed' if scheme.packed else 'weight'}")
    if info is None or len(info.shape) != 2:
        raise CheckpointError(
            f"layer {name!r} has a weight_scale, but no two-dimensional weight for {scheme.file_format}"
        )
    scale_info = infos[f"{name}.weight_scale"]
    if info.dtype.itemsize != 1 or scale_info.dtype.itemsize != 1:
        raise CheckpointError(
            f"layer {name!r}: {scheme.file_format} stores codes and scales as bytes, got {info.dtype} and"
            f" {scale_info.dtype}"
        )
    cols = info.shape[1] * 2 if scheme.packed else info.shape[1]
    fmt = _base(scheme)
    assert isinstance(fmt.block, VectorBlock)
    grid = (info.shape[0], -(-cols // fmt.block.size))
    if cols % fmt.block.size or scale_info.shape != grid:
        raise CheckpointError(f"layer {name!r}: scales of shape {list(scale_info.shape)} do not fit a width of {cols}")
    if fmt.tensor_scale is not None and f"{name}.weight_global_scale" not in infos:
        raise CheckpointError(f"layer {name!r} is NVFP4, but its weight_global_scale is missing")
    activations = group.get("input_activations")
    return LayerSpec(
        name=name,
        format=fmt,
        shape=(info.shape[0], cols),
        dtype=dtype,
        activations=None if activations is None else _read_activations(name, activations),
        method="unknown",
    )


def _scheme_of(name: str, file_format: Any, weights: Any) -> _Scheme:
    for scheme in _SCHEMES:
        if scheme.file_format == file_format or (file_format is None and _fits(scheme, weights)):
            if not _fits(scheme, weights):
                raise CheckpointError(f"layer {name!r}: weights {weights!r} contradict the format {file_format!r}")
            return scheme
    known = ", ".join(scheme.file_format for scheme in _SCHEMES)
    raise CheckpointError(
        f"layer {name!r} has the compressed-tensors format {file_format!r}, which microscale does not read;"
        f" it reads {known}"
    )


def _fits(scheme: _Scheme, arguments: Any) -> bool:
    if not isinstance(arguments, dict):
        return False
    found = cast("dict[str, Any]", arguments)
    return all(
        found.get(key) == scheme.arguments[key] for key in ("num_bits", "type", "strategy", "group_size", "symmetric")
    )


def _read_activations(name: str, arguments: Any) -> ActivationSpec:
    for scheme in _SCHEMES:
        if _fits(scheme, arguments):
            if scheme.base != "nvfp4":
                return parse_activation(scheme.base)
            if arguments.get("dynamic") == "local":
                return ActivationSpec(format=parse_format("nvfp4"), range=RangeKind.STATIC)
            return parse_activation("e2m1/16:e4m3")
    raise CheckpointError(
        f"layer {name!r}: compressed-tensors activations {arguments!r} are not read; MXFP4, MXFP8 and NVFP4 are"
    )


def is_held_by_scheme(fmt: Format, recorded: Format) -> bool:
    """Whether a file of this layout that reads as ``fmt`` may hold the bits of ``recorded``."""
    scheme = _weight_scheme(recorded)
    return scheme is not None and parse_format(scheme.base) == fmt


def is_read(config: Mapping[str, Any]) -> bool:
    """Whether all groups of a config are of the formats that run packed here: MXFP4, MXFP8 and NVFP4."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return True  # what is wrong is said when it is read
    known = {scheme.file_format for scheme in _SCHEMES}
    entries = [entry for entry in cast("dict[str, Any]", groups).values() if isinstance(entry, dict)]
    formats = [entry.get("format") or config.get("format") for entry in cast("list[dict[str, Any]]", entries)]
    integers = [(entry.get("weights") or {}).get("type") == "int" for entry in cast("list[dict[str, Any]]", entries)]
    return not any(integers) and all(form is None or form in known for form in formats)
