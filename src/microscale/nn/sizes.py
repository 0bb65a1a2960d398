"""How large layers and models are, in bytes and in bits per weight; each way of counting is a function of its own.

==========================  ====================================================================================
``spec_bytes``              a quantized tensor by its format and shape alone, as a file holds it
``module_bytes``            a layer: its packed weight and what stays beside it for run time, or its float weight
``packed_size``             several packed layers together
``file_size``               a whole model as its file holds it: packed layers, all else in the dtype of the file
``held_size``               all parameters and buffers of a model as they lie in memory, some weights left out
==========================  ====================================================================================

Biases count in whole models only. What a memory layout pads counts as soon as a layer is in that layout, so whoever
wants the size of a file counts before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from microscale.formats import Format
from microscale.layouts import part_specs
from microscale.nn.packed import PackedModule


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """So many weights in so many bytes."""

    num_weights: int
    num_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits for each weight, scales and all other parts included; 0 without weights."""
        return 8 * self.num_bytes / self.num_weights if self.num_weights else 0.0

    def __add__(self, other: Size) -> Size:
        return total_size((self, other))


def total_size(sizes: Iterable[Size]) -> Size:
    """Return the sum."""
    found = list(sizes)
    return Size(num_weights=sum(one.num_weights for one in found), num_bytes=sum(one.num_bytes for one in found))


def spec_bytes(fmt: Format, shape: tuple[int, ...]) -> int:
    """Return the bytes of all parts of a quantized tensor in a file."""
    return sum(spec.num_bytes for spec in part_specs(fmt, shape).values())


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of a layer's weight: packed with what stays for run time, or float; a bias does not count."""
    if isinstance(module, PackedModule):
        return module.num_bytes
    weight = module.get_parameter("weight")
    return weight.numel() * weight.element_size()


def packed_size(modules: Iterable[nn.Module]) -> Size:
    """Return the size of the packed layers among some modules, with what stays for run time.

    The weight of a layer that is tied to another one counts there.
    """
    packed = [module for module in modules if isinstance(module, PackedModule)]
    weights = sum(module.shape[0] * module.shape[1] for module in packed if not module.is_tied)
    shared = sum(module.holder.num_bytes for module in packed if module.is_tied)
    return Size(num_weights=weights, num_bytes=sum(map(module_bytes, packed)) - shared)


def file_size(model: nn.Module, packed: Size, dtype: torch.dtype) -> Size:
    """Return the size of a model's file, all weights counted, whatever dtype it computes in.

    ``packed`` are its packed layers as they were counted in row_major; a parameter that two layers share counts once.
    """
    others = sum(parameter.numel() for parameter in model.parameters())
    return packed + Size(num_weights=others, num_bytes=others * dtype.itemsize)


def held_size(model: nn.Module, without: Iterable[str] = ()) -> Size:
    """Return the size of parameters and buffers in their own dtypes, each once, besides the weights of some layers.

    Buffers take bytes, and are no weights.
    """
    left_out = {id(model.get_submodule(name).get_parameter("weight")) for name in without}
    weights = {id(one): one for one in model.parameters() if id(one) not in left_out}
    every = {id(one): one for one in (*model.buffers(), *weights.values())}
    return Size(
        num_weights=sum(one.numel() for one in weights.values()),
        num_bytes=sum(one.numel() * one.element_size() for one in every.values()),
    )


def size_text(num_bytes: float) -> str:
    """Return a size in the largest decimal unit that leaves at least 1."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"
