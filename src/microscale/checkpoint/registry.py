"""The file layouts by name and by ``quant_method``, and the choice of one for a set of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch

from microscale.checkpoint import compressed_tensors, gpt_oss, quark
from microscale.checkpoint.compressed_tensors import CompressedTensorsLayout
from microscale.checkpoint.gpt_oss import GptOssLayout
from microscale.checkpoint.native import NativeLayout
from microscale.checkpoint.quark import QuarkLayout
from microscale.checkpoint.schema import FileLayout, TensorInfo
from microscale.errors import CheckpointError, LayoutError, nearest
from microscale.formats import (
    BlockFormat,
    Format,
    PairFormat,
    SegmentedFormat,
    format_name,
    parse_activation,
    parse_format,
    spec_text,
)
from microscale.formats.dtypes import dtype_name
from microscale.layer_spec import LayerSpec

_COMPRESSED_TENSORS = CompressedTensorsLayout()
_GPT_OSS = GptOssLayout()
_NATIVE = NativeLayout()
_QUARK = QuarkLayout()

WRITABLE_LAYOUTS: Mapping[str, FileLayout] = MappingProxyType(
    {"compressed-tensors": _COMPRESSED_TENSORS, "quark": _QUARK, "gpt-oss": _GPT_OSS, "microscale": _NATIVE}
)
"""Layouts by the word of ``--layout``."""

READABLE_METHODS: Mapping[str, FileLayout] = MappingProxyType(
    {"compressed-tensors": _COMPRESSED_TENSORS, "microscale": _NATIVE, "quark": _QUARK, "mxfp4": _GPT_OSS}
)
"""Layouts by the ``quant_method`` of a quantization_config."""


def layout_named(word: str) -> FileLayout:
    """Return the layout of a word.

    Raises:
        LayoutError: an unknown word.
    """
    layout = WRITABLE_LAYOUTS.get(word)
    if layout is None:
        words = ("auto", *WRITABLE_LAYOUTS)
        raise LayoutError(f"unknown layout {word!r}{nearest(word, words) or ';'} possible: {', '.join(words)}")
    return layout


def choose_layout(word: str, layers: Sequence[LayerSpec], obstacle: str | None = None) -> FileLayout:
    """Return the layout to write; ``auto`` is compressed-tensors where it holds every layer exactly, else ours.

    ``obstacle`` says why the model itself, whatever its layers, cannot be in a layout of another tool.

    Raises:
        LayoutError: the layout asked for cannot hold a layer.
    """
    if word == "auto":
        fits = obstacle is None and all(_COMPRESSED_TENSORS.refusal(layer) is None for layer in layers)
        return _COMPRESSED_TENSORS if fits else _NATIVE
    layout = layout_named(word)
    if obstacle is not None and layout is not _NATIVE:
        raise LayoutError(f"layout {word} cannot hold this model: {obstacle}")
    for layer in layers:
        reason = layout.refusal(layer)
        if reason is not None:
            raise LayoutError(f"layout {word} cannot hold layer {layer.name}: {reason}")
    return layout


def layout_of(config: Mapping[str, Any]) -> FileLayout:
    """Return the layout of a ``quantization_config``.

    Raises:
        CheckpointError: a quant_method that we do not read.
    """
    method = config.get("quant_method")
    layout = READABLE_METHODS.get(str(method))
    if layout is None:
        raise CheckpointError(
            f"quant_method {method!r} is not one that microscale reads; it reads {', '.join(READABLE_METHODS)}"
        )
    return layout


def describe_layers(layers: Sequence[LayerSpec], layout: str, version: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the ``microscale`` object of config.json: everything that decided the bits, layer by layer.

    ``dtype`` is the float type of the model, which a layout may have to misstate in config.json.
    """
    groups: dict[tuple[str, str, str], list[LayerSpec]] = {}
    for layer in layers:
        groups.setdefault((spec_text(layer.format), str(layer.activations), layer.method), []).append(layer)
    return {
        "version": version,
        "layout": layout,
        "dtype": dtype_name(dtype),
        "schemes": [
            {**_scheme(members[0]), "layers": [layer.name for layer in members]} for members in groups.values()
        ],
    }


def _scheme(layer: LayerSpec) -> dict[str, Any]:
    return {
        "name": format_name(layer.format),
        "format": spec_text(layer.format),
        **_policies(layer.format),
        "activations": None if layer.activations is None else str(layer.activations),
        "method": layer.method,
    }


def _policies(fmt: Format) -> dict[str, Any]:
    if isinstance(fmt, PairFormat):
        return {"low": _policies(fmt.low), "high": _policies(fmt.high)}
    if isinstance(fmt, SegmentedFormat):
        return {"segments": [_policies(segment.format) for segment in fmt.segments]}
    assert isinstance(fmt, BlockFormat)
    return {
        "scale_rule": str(fmt.rule),
        "rounding": fmt.rounding.value,
        "seed": fmt.seed,
        "overflow": fmt.overflow.value,
        "nan_policy": fmt.nan_policy.value,
        "inf_policy": fmt.inf_policy.value,
    }


def read_stored_layers(
    config: Mapping[str, Any], infos: Mapping[str, TensorInfo], dtype: torch.dtype
) -> tuple[FileLayout, dict[str, LayerSpec]]:
    """Return the layout and the quantized layers of a checkpoint from its config.json and tensor headers.

    Where a file of another tool's layout carries our ``microscale`` object, the exact formats come from there.

    Raises:
        CheckpointError: a config that cannot be read, or that contradicts the tensors.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise CheckpointError(f"config.json: quantization_config must be an object, got {quantization!r}")
    layout = layout_of(cast("dict[str, Any]", quantization))
    layers = layout.stored_layers(cast("dict[str, Any]", quantization), infos, dtype)
    note = config.get("microscale")
    checks = {
        _COMPRESSED_TENSORS.name: compressed_tensors.is_held_by_scheme,
        _QUARK.name: quark.is_held_by_entry,
        _GPT_OSS.name: gpt_oss.is_held_by_blocks,
    }
    if layout.name in checks and isinstance(note, dict):
        layers = _with_note(layers, cast("dict[str, Any]", note), checks[layout.name])
    return layout, layers


def rule_of_file(fmt: Format, recorded: Format, is_held: Callable[[Format, Format], bool]) -> Format:
    """Return ``recorded`` (our own note of the exact format) where its bits are those of the file's ``fmt``.

    Raises:
        CheckpointError: the note contradicts the file.
    """
    if not is_held(fmt, recorded):
        raise CheckpointError(
            f"config.json: the microscale object says {format_name(recorded)}, but the tensors are {format_name(fmt)}"
        )
    return recorded


def _with_note(
    layers: dict[str, LayerSpec], note: Mapping[str, Any], is_held: Callable[[Format, Format], bool]
) -> dict[str, LayerSpec]:
    result = dict(layers)
    try:
        for scheme in note["schemes"]:
            recorded = parse_format(str(scheme["format"]))
            activations = scheme["activations"]
            for name in scheme["layers"]:
                layer = result[str(name)]
                executed = None if activations is None else parse_activation(str(activations))
                if executed != layer.activations:
                    raise CheckpointError(
                        f"config.json: the microscale object says activations {executed} for layer {layer.name!r}, but"
                        f" quantization_config says {layer.activations}"
                    )
                result[layer.name] = dataclasses.replace(
                    layer,
                    format=rule_of_file(layer.format, recorded, is_held),
                    activations=executed,
                    method=str(scheme.get("method", "unknown")),
                )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: the microscale object cannot be read: {error!r}") from None
    return result
