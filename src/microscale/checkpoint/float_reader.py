"""A checkpoint that another tool has quantized, read as if it held floats.

Each quantized weight has a float one in its place, made when it is read; so whatever reads an unquantized checkpoint,
as a whole or layer by layer, reads this one. What the file says of activations and of the cache is left out, by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from microscale.checkpoint.float_packed import (
    awq_weights,
    bitsandbytes_weights,
    gptq_weights,
    state_shape,
)
from microscale.checkpoint.float_weights import (
    FloatWeight,
    compressed_weights,
    fp8_weights,
    modelopt_weights,
)
from microscale.checkpoint.reader import CheckpointReader, read_json
from microscale.checkpoint.registry import READABLE_METHODS
from microscale.checkpoint.schema import TensorInfo
from microscale.errors import CheckpointError, counted
from microscale.formats.dtypes import dtype_name

Finder = Callable[[Mapping[str, TensorInfo], Mapping[str, Any]], dict[str, FloatWeight]]
"""From the tensor tables of a file and its quantization config to the weights in it."""

FINDERS: Mapping[str, tuple[str, Finder]] = MappingProxyType(
    {
        "fp8": ("FP8", fp8_weights),
        "fbgemm_fp8": ("FP8", fp8_weights),
        "compressed-tensors": ("compressed-tensors", compressed_weights),
        "gptq": ("GPTQ", gptq_weights),
        "awq": ("AWQ", awq_weights),
        "bitsandbytes": ("bitsandbytes", bitsandbytes_weights),
        "modelopt": ("ModelOpt", modelopt_weights),
    }
)
"""What a ``quant_method`` is called, and what finds its weights."""

MODELOPT_CONFIG = "hf_quant_config.json"
"""Where ModelOpt says what it did, in files whose config.json does not."""

OF_INPUTS = re.compile(
    r"\.(input_scale|input_global_scale|input_zero_point|input_scale_ub|activation_scale|act_scale|output_scale"
    r"|output_zero_point|weight_shape|weight_g_idx|weight_zero_point|pre_quant_scale)$"
)
"""The tensors of a layer that say how its inputs and outputs were rounded."""
OF_CACHE = re.compile(
    r"(\.(k_scale|v_scale|q_scale|prob_output_scale|k_zero_point|v_zero_point|kv_scale)|\.[kv]_proj\.output_scale)$"
)
"""The tensors of attention that say how keys and values were rounded."""


class FloatReader(CheckpointReader):
    """The tensors of a checkpoint that another tool has quantized, as floats of the type that its config declares.

    ``stored_as`` says what was stored; ``told`` are sentences for the user.

    Raises:
        CheckpointError: no quantization that is read so, or tensors that do not fit together.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        stored = quantization_of(self)
        word, find = FINDERS[str((stored or {}).get("quant_method"))]
        self._made = find(self.infos, stored or {})
        self._made = {name: self._with_shape(weight) for name, weight in self._made.items()}
        used = {part for weight in self._made.values() for part in weight.parts}
        floats = {name: TensorInfo(dtype=self.dtype, shape=weight.shape) for name, weight in self._made.items()}
        others = {name: info for name, info in self._stored.items() if name not in used}
        cache = [name for name in others if OF_CACHE.search(name)]
        inputs = [name for name in others if OF_INPUTS.search(name) and name not in cache]
        self.infos = {name: info for name, info in others.items() if name not in {*inputs, *cache}} | floats
        self.cache_scheme = _cache_scheme(stored or {})
        self._renamed = {_cache_name(name): name for name in cache}
        self.infos |= {name: others[stored_name] for name, stored_name in self._renamed.items()}
        self.stored_as = f"{word}{_details(stored or {})}"
        self.told = [
            f"{counted(len(self._made), 'weight')} of {self.path} stored as {self.stored_as}: read as"
            f" {dtype_name(self.dtype)}. What their first rounding lost stays lost"
        ]
        if inputs:
            self.told.append(f"the file rounds inputs of layers too ({_few(inputs)}): here they stay as they are")
        if cache and self.cache_scheme is None:
            self.told.append(
                f"the file holds scales of keys and values ({_few(cache)}), but no kv_cache_scheme: they stay as they"
                " are here; --kv-cache FORMAT rounds them"
            )

    @property
    def quantization_config(self) -> None:
        """None: what is read here are floats."""
        return None

    def load(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read one tensor, or make a weight of those it is stored as; see :meth:`CheckpointReader.load`."""
        weight = self._made.get(name)
        if weight is None:
            return super().load(self._renamed.get(name, name), dtype)
        try:
            values = weight.make(super().load)
        except (RuntimeError, LookupError, ValueError, TypeError, ZeroDivisionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path}: the parts of {name!r} do not fit together: {error}") from error
        if tuple(values.shape) != weight.shape:
            raise CheckpointError(
                f"{self.path}: the parts of {name!r} make a weight of shape {list(values.shape)}, not"
                f" {list(weight.shape)}"
            )
        return values.to(dtype or self.dtype)

    def _with_shape(self, weight: FloatWeight) -> FloatWeight:
        return weight if weight.shape else dataclasses.replace(weight, shape=state_shape(super().load, weight))


def open_floats(path: str | Path) -> CheckpointReader:
    """Open a directory as one of floats: unquantized, or quantized by another tool.

    Raises:
        CheckpointError: as :class:`CheckpointReader` and :class:`FloatReader`.
    """
    reader = CheckpointReader(path)
    return FloatReader(path) if str((quantization_of(reader) or {}).get("quant_method")) in FINDERS else reader


def quantization_of(reader: CheckpointReader) -> Mapping[str, Any] | None:
    """Return the quantization config of a checkpoint, from config.json or from ModelOpt's own file.

    Raises:
        CheckpointError: a quant_method that is not read.
    """
    config = CheckpointReader.quantization_config.fget(reader)  # type: ignore[misc]
    beside = reader.path / MODELOPT_CONFIG
    if config is None and beside.exists():
        found = read_json(beside).get("quantization")
        config = {**(cast("dict[str, Any]", found) if isinstance(found, dict) else {}), "quant_method": "modelopt"}
    if config is None:
        return None
    method = str(given := config.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in config else None))
    if method.startswith("modelopt"):
        method = "modelopt"
    if method not in FINDERS and method not in READABLE_METHODS:
        known = ", ".join(sorted({*FINDERS, *READABLE_METHODS}))
        raise CheckpointError(f"quant_method {given!r} is not one that microscale reads; it reads {known}")
    return {**config, "quant_method": method}


def _details(config: Mapping[str, Any]) -> str:
    """Return what distinguishes a file of its kind, in brackets."""
    blocks = config.get("weight_block_size")
    words = [
        "" if blocks is None else "blocks of " + " x ".join(map(str, blocks)),
        str(config.get("quant_algo") or ""),
        str(config.get("format") or ""),
        f"{config['bits']} bits" if "bits" in config else "",
        str(config.get("bnb_4bit_quant_type") or "") if config.get("load_in_4bit") else "",
        "int8" if config.get("load_in_8bit") else "",
    ]
    said = ", ".join(word for word in words if word)
    return f" ({said})" if said else ""


def _cache_scheme(config: Mapping[str, Any]) -> Any:
    """Return what a file says of keys and values, in the words of compressed-tensors; ModelOpt has one word for it."""
    if config.get("kv_cache_scheme") is not None:
        return config["kv_cache_scheme"]
    word = config.get("kv_cache_quant_algo")
    if word is None:
        return None
    kind = {"FP8": ("float", 8), "INT8": ("int", 8)}.get(str(word), (str(word), None))
    return {"type": kind[0], "num_bits": kind[1], "strategy": "tensor", "symmetric": True, "dynamic": False}


def _cache_name(name: str) -> str:
    """Return under which name of compressed-tensors a scale of keys or values is known: ``ATTENTION.k_scale``."""
    return re.sub(r"\.k_proj\.(k_scale|output_scale)$|\.v_proj\.(v_scale|output_scale)$", _short, name)


def _short(match: re.Match[str]) -> str:
    return f".{match[0][1]}_scale"


def _few(names: list[str]) -> str:
    return f"{counted(len(names), 'tensor')}, e.g. {names[0]}"
