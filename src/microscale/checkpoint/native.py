"""Our own layout (``quant_method: "microscale"``): any format; docs/reference/checkpoint.md documents it.

A quantized layer X has the tensors ``X.weight_<part>`` with the parts of :mod:`microscale.layouts.row_major`, and
``X.activations.amax`` where its activations have a stored range, ``X.transforms.<i>_<part>`` for its online
transforms, and ``X.low_rank.down`` and ``.up`` for a low-rank side path. ``quantization_config`` lists the
schemes (format, activations, method, transforms) and which layer, of which shape, has which. A layer that is tied to
another one (a head to its embedding) names it and has no ``weight_<part>``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from microscale.checkpoint.schema import TensorInfo
from microscale.checkpoint.validation import check_parts
from microscale.errors import CheckpointError, FormatError, LayoutError
from microscale.formats import RangeKind, format_name, parse_activation, parse_format, spec_text
from microscale.formats.dtypes import FLOAT_DTYPES, dtype_name
from microscale.layer_spec import LayerSpec
from microscale.layouts import part_specs
from microscale.tensor import QuantizedTensor
from microscale.transforms import parse_transform

QUANT_METHOD = "microscale"
FORMAT_VERSION = 2
"""Version of the layout; a reader refuses a higher one. A file without tied layers says 1, and has what 1 has."""


class NativeLayout:
    """The layout ``microscale``; see :class:`microscale.checkpoint.schema.FileLayout` for the methods."""

    name = "microscale"

    def refusal(self, layer: LayerSpec) -> str | None:
        """Hold everything."""
        return None

    def pack(self, layer: LayerSpec, tensor: QuantizedTensor) -> dict[str, Tensor]:
        """Name the parts; a layer that is tied to another one has none.

        Raises:
            LayoutError: a piece of a tensor whose sparse table or pair has another share than its format names.
        """
        if layer.tied_to is not None:
            return {}
        for part, spec in part_specs(layer.format, layer.shape).items():
            if tuple(tensor.parts[part].shape) != spec.shape:
                raise LayoutError(
                    f"{layer.name}: {part!r} of a {format_name(layer.format)} tensor in a file has the shape"
                    f" {list(spec.shape)}, got {list(tensor.parts[part].shape)},"
                    " a piece of a tensor; join all pieces first"
                )
        return {f"{layer.name}.weight_{part}": value for part, value in tensor.parts.items()}

    def config(self, layers: Sequence[LayerSpec], unquantized: Sequence[str]) -> dict[str, Any]:
        """Write schemes and the map from layers to them."""
        schemes: list[dict[str, Any]] = []
        listed: dict[str, Any] = {}
        for layer in layers:
            scheme: dict[str, Any] = {
                "format": spec_text(layer.format),
                "activations": None if layer.activations is None else str(layer.activations),
                "method": layer.method,
                "kind": layer.kind,
                "dtype": dtype_name(layer.dtype),
            }
            if layer.transforms:
                scheme["transforms"] = [str(spec) for spec in layer.transforms]
            if layer.low_rank:
                scheme["low_rank"] = layer.low_rank
            if scheme not in schemes:
                schemes.append(scheme)
            listed[layer.name] = {"scheme": schemes.index(scheme), "shape": list(layer.shape)}
            if layer.tied_to is not None:
                listed[layer.name]["tied_to"] = layer.tied_to
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION if any(layer.tied_to for layer in layers) else 1,
            "schemes": schemes,
            "layers": listed,
            "unquantized": list(unquantized),
        }

    def stored_layers(
        self, config: Mapping[str, Any], infos: Mapping[str, TensorInfo], dtype: torch.dtype
    ) -> dict[str, LayerSpec]:
        """Read the map back and check every tensor's header against it."""
        layers = read_layers(config)
        for layer in layers.values():
            own = {} if layer.tied_to is not None else part_specs(layer.format, layer.shape)
            for part, spec in own.items():
                name = f"{layer.name}.weight_{part}"
                info = infos.get(name)
                if info is None:
                    raise CheckpointError(f"tensor {name!r} is missing: {layer.name} is {format_name(layer.format)}")
                if info.dtype != spec.dtype or info.shape != spec.shape:
                    raise CheckpointError(
                        f"tensor {name!r} of {format_name(layer.format)} must be {spec.dtype} {list(spec.shape)},"
                        f" got {info.dtype} {list(info.shape)}; the checkpoint is damaged"
                    )
            _check_range(layer, infos)
            _check_online(layer, infos)
        return layers

    def unpack(self, layer: LayerSpec, load: Callable[[str], Tensor]) -> QuantizedTensor:
        """Read and check all parts."""
        parts = {part: load(f"{layer.name}.weight_{part}") for part in part_specs(layer.format, layer.shape)}
        check_parts(layer.name, layer.format, layer.shape, parts)
        return QuantizedTensor(format=layer.format, shape=layer.shape, dtype=layer.dtype, parts=parts)

    def tensor_names(self, layer: LayerSpec) -> list[str]:
        """Name the parts of a layer with a weight of its own."""
        if layer.tied_to is not None:
            return []
        return [f"{layer.name}.weight_{part}" for part in part_specs(layer.format, layer.shape)]


def range_name(layer: LayerSpec) -> str | None:
    """Return the name of the tensor with the layer's activation range, or None where it has none."""
    if layer.activations is None or layer.activations.range is RangeKind.DYNAMIC:
        return None
    return f"{layer.name}.activations.amax"


def online_infos(layer: LayerSpec) -> dict[str, TensorInfo]:
    """Return the tensors of a layer's online transforms and low-rank side path, by their names in the file."""
    rows, cols = layer.shape[-2:]
    infos: dict[str, TensorInfo] = {}
    for i, spec in enumerate(layer.transforms):
        for part, (shape, dtype) in spec.part_specs(cols).items():
            infos[f"{layer.name}.transforms.{i}_{part}"] = TensorInfo(dtype=dtype, shape=shape)
    if layer.low_rank:
        infos[f"{layer.name}.low_rank.down"] = TensorInfo(dtype=torch.float32, shape=(layer.low_rank, cols))
        infos[f"{layer.name}.low_rank.up"] = TensorInfo(dtype=torch.float32, shape=(rows, layer.low_rank))
    return infos


def _check_online(layer: LayerSpec, infos: Mapping[str, TensorInfo]) -> None:
    """Check the headers of what a layer does online.

    Raises:
        CheckpointError: a tensor is missing, or of another dtype or shape.
    """
    for name, expected in online_infos(layer).items():
        if infos.get(name) != expected:
            raise CheckpointError(
                f"tensor {name!r} must be {expected.dtype} {list(expected.shape)}, got {infos.get(name)};"
                " the checkpoint is damaged"
            )


def _check_range(layer: LayerSpec, infos: Mapping[str, TensorInfo]) -> None:
    """Check the header of a stored activation range.

    Raises:
        CheckpointError: it is missing, or of another dtype or length than the activations ask for.
    """
    name = range_name(layer)
    if name is None or layer.activations is None:
        return
    spec = layer.activations
    expected = TensorInfo(dtype=torch.float32, shape=(spec.num_ranges,))
    if infos.get(name) != expected:
        raise CheckpointError(
            f"tensor {name!r} with the range of activations {spec} must be {expected.dtype} {list(expected.shape)},"
            f" got {infos.get(name)}; the checkpoint is damaged"
        )


def read_layers(config: Mapping[str, Any]) -> dict[str, LayerSpec]:
    """Parse the ``quantization_config`` of our layout.

    Raises:
        CheckpointError: a newer version, or entries that are missing or cannot be read.
    """
    version = config.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"quantization_config has format_version {version!r}, this microscale reads 1 to {FORMAT_VERSION};"
            " install a newer microscale"
        )
    schemes, listed = config.get("schemes"), config.get("layers")
    if not isinstance(schemes, list) or not isinstance(listed, dict) or not listed:
        raise CheckpointError("quantization_config of quant_method microscale needs 'schemes' and 'layers'")
    result: dict[str, LayerSpec] = {}
    for name, entry in cast("dict[str, Any]", listed).items():
        try:
            result[name] = _layer(name, entry, cast("list[Any]", schemes))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, FormatError) as error:
            raise CheckpointError(f"quantization_config: layer {name!r} cannot be read: {error!r}") from None
    for name, layer in result.items():
        owner = None if layer.tied_to is None else result.get(layer.tied_to)
        fits = owner is not None and (owner.tied_to, owner.format, owner.shape) == (None, layer.format, layer.shape)
        if layer.tied_to is not None and not fits:
            raise CheckpointError(
                f"quantization_config: layer {name!r} is tied to {layer.tied_to!r}, which is no layer of its format and"
                " shape with a weight of its own"
            )
    return result


def _layer(name: str, entry: Mapping[str, Any], schemes: list[Any]) -> LayerSpec:
    number, lengths = entry["scheme"], entry["shape"]
    if type(number) is not int or not 0 <= number < len(schemes):
        raise ValueError(f"scheme {number!r} of {len(schemes)}")
    scheme = cast("Mapping[str, Any]", schemes[number])
    if not isinstance(lengths, list) or any(type(length) is not int or length < 1 for length in lengths):
        raise ValueError(f"shape {lengths!r}")
    shape = tuple(cast("list[int]", lengths))
    if len(shape) < 2:
        raise ValueError(f"shape {list(shape)}")
    dtype = getattr(torch, str(scheme["dtype"]))
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype {scheme['dtype']!r}")
    activations = scheme.get("activations")
    transforms, low_rank = scheme.get("transforms", []), scheme.get("low_rank", 0)
    if not isinstance(transforms, list) or type(low_rank) is not int or low_rank < 0:
        raise ValueError(f"transforms {transforms!r}, low_rank {low_rank!r}")
    specs = tuple(parse_transform(str(word)) for word in cast("list[Any]", transforms))
    for spec in specs:
        spec.part_specs(shape[-1])
    fmt = parse_format(str(scheme["format"]))
    part_specs(fmt, shape)
    return LayerSpec(
        name=name,
        format=fmt,
        shape=shape,
        dtype=dtype,
        activations=None if activations is None else parse_activation(str(activations)),
        method=str(scheme.get("method", "unknown")),
        kind=str(scheme.get("kind", "linear")),
        transforms=specs,
        low_rank=low_rank,
        tied_to=None if entry.get("tied_to") is None else str(entry["tied_to"]),
    )
