"""Which modules count as linear layers, and how their weight lies."""

from __future__ import annotations

import functools

import torch
from torch import nn


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D: a linear layer whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x @ W.T + b and nothing else: nn.Linear, Conv1D, or a subclass that does the same."""
    return is_transposed(module) or computes_linear(type(module))


@functools.cache
def computes_linear(kind: type[nn.Module]) -> bool:
    """Whether a class of modules computes what nn.Linear does: its forward, or (Falcon) one with the same numbers.

    A forward of its own is tried on a small layer. A class that cannot be built as nn.Linear computes something else.
    """
    if not issubclass(kind, nn.Linear):
        return False
    if kind.forward is nn.Linear.forward:
        return True
    inputs = torch.linspace(-1.0, 1.0, 12).reshape(1, 3, 4)
    try:
        with torch.no_grad():
            layers = [kind(4, 2, bias=has_bias) for has_bias in (False, True)]
            for layer in layers:
                for parameter in layer.parameters():
                    parameter.copy_(torch.linspace(0.5, -2.0, parameter.numel()).reshape(parameter.shape))
            return all(torch.allclose(layer(inputs), nn.Linear.forward(layer, inputs), rtol=1e-5) for layer in layers)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False


def linear_names(module: nn.Module) -> list[str]:
    """Return the dotted names of all linear layers in a module, in the order of their definition."""
    return [name for name, child in module.named_modules() if is_linear(child)]


def adapter_places(model: nn.Module) -> tuple[str, ...]:
    """Return how the names of modules begin that belong to adapters: what stands beside the ``base_layer`` of one."""
    return tuple(
        f"{name}.{child}."
        for name, module in model.named_modules()
        if "base_layer" in dict(module.named_children())
        for child, _ in module.named_children()
        if child != "base_layer"
    )
