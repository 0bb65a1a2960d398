"""Methods that turn a weight into a quantized tensor, one file for each; the registry by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from microscale.algorithms.rtn import rtn
from microscale.tensor import QuantizedTensor

METHODS: Mapping[str, Callable[..., QuantizedTensor]] = MappingProxyType({"rtn": rtn})
"""Every method by the word of ``--method``."""

__all__ = ["METHODS", "rtn"]
