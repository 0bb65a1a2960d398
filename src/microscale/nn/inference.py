"""Bring the packed weights of a model into the form in which they run fastest, and back for saving."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from microscale.layouts.row_major import NAME as ROW_MAJOR
from microscale.nn.gradients import GradientWatch, ModelWatch
from microscale.nn.linear import QuantizedLinear
from microscale.nn.packed import PackedModule


def prepare_for_inference(model: nn.Module) -> list[str]:
    """Lay every packed linear layer out as the fastest kernel for it reads it; returns the names of those changed.

    ``microscale.quantize`` and ``microscale.load`` do this at their end, so that nobody else needs to: a model is ready
    before torch.compile, torch.export or several threads see it, and no forward call changes it. (At the first use
    instead, a compiled graph would hold the old parts, and two threads could lay out the same weight.)

    One layer after the other is laid out in the place of the old parts. Where no backend but the reference one runs a
    layer, it stays in row_major. The results of the model are within the bounds of ``linear`` in any layout. Saving
    writes the same bytes as before. A move to another device lays out for that one.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    return [name for name, module in linears.items() if module.prepare(dtype)]


def freeze(model: nn.Module) -> None:
    """Let no parameter of a quantized model ask for a gradient; see :mod:`microscale.nn.gradients`.

    A gradient that is asked for afterwards flows through the reference path, and a
    :class:`~microscale.errors.GradientNote` says so once.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    shared = ModelWatch()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.watch = GradientWatch(layer=name, model=shared)


@contextmanager
def row_major_weights(model: nn.Module) -> Generator[None, None, None]:
    """Bring all packed weights into row_major inside the block, one layer after the other, and back afterwards."""
    modules = [module for module in model.modules() if isinstance(module, PackedModule)]
    before = [module.layout for module in modules]
    try:
        for module in modules:
            module.set_layout(ROW_MAJOR)
        yield
    finally:
        for module, layout in zip(modules, before, strict=True):
            module.set_layout(layout)


@contextmanager
def cached_weights(model: nn.Module) -> Generator[None, None, None]:
    """Keep a float copy of every packed weight in row_major inside the block: the reference path runs faster so.

    A weight in another layout has a kernel that reads it packed, and needs no copy.
    """
    modules = [module for module in model.modules() if isinstance(module, PackedModule) and module.layout == ROW_MAJOR]
    for module in modules:
        module.cache_weight()
    try:
        yield
    finally:
        for module in modules:
            module.drop_cached_weight()
