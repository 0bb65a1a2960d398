"""Take stacked experts apart, so that their matrices are linear layers like all others."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from microscale.nn.experts import Experts, has_stacked_experts, why_not_unstacked
from microscale.recipes.modules import replace_module


def stacked_experts(model: nn.Module) -> dict[str, str | None]:
    """Return the modules with stacked experts, each with the reason why it cannot be taken apart (None: it can)."""
    return {name: why_not_unstacked(module) for name, module in model.named_modules() if has_stacked_experts(module)}


def every_module(name: str) -> bool:
    """Choose all modules."""
    del name
    return True


def unstack_experts(model: nn.Module, chosen: Callable[[str], bool] = every_module) -> tuple[str, ...]:
    """Replace modules with stacked experts by :class:`Experts`; returns the names of those that were replaced.

    What the model computes stays the same, up to the order of sums. Routers are left alone. Experts that cannot be
    taken apart stay as they are: :func:`stacked_experts` says why. ``chosen`` picks modules by name.
    """
    names = tuple(name for name, reason in stacked_experts(model).items() if reason is None and chosen(name))
    for name in names:
        replace_module(model, name, Experts.from_stacked(model.get_submodule(name)))
    return names
