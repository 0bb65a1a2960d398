"""Which modules count as linear layers, and how their weight lies."""

from __future__ import annotations

from torch import nn


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D: a linear layer whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x @ W.T + b and nothing else: nn.Linear, Conv1D, or a subclass with that forward."""
    return is_transposed(module) or type(module).forward is nn.Linear.forward


def linear_names(module: nn.Module) -> list[str]:
    """Return the dotted names of all linear layers in a module, in the order of their definition."""
    return [name for name, child in module.named_modules() if is_linear(child)]
