"""What layers are for: the roles that a pattern of a recipe may name in place of modules.

Layers of decoder layers have the roles of their family (``attention.qkv``, ``attention.out``, ``mlp.gate_up``,
``mlp.down``, those of experts), others are ``embedding``, ``lm_head`` or ``other``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from microscale.errors import ModelError
from microscale.families.look_up import describe
from microscale.recipes.recipe import matches


def layer_roles(model: Any, modules: Mapping[str, tuple[str, nn.Module]], part: str = "language") -> dict[str, str]:
    """Return the role of every module, given as name -> (kind, module); a model without blocks has only the others."""
    roles: dict[str, str] = {}
    try:
        blocks = describe(model, part).blocks
    except ModelError:
        blocks = ()
    for block in blocks:
        for group in block.groups:
            roles.update({f"{block.name}.{linear}": group.role for linear in group.linears})
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, (kind, module) in modules.items():
        if name not in roles:
            roles[name] = "embedding" if kind == "embedding" else "lm_head" if module is head else "other"
    return roles


def is_meant(pattern: str, name: str, role: str) -> bool:
    """Whether a pattern is the role of a layer, or a glob that matches its name (see :mod:`recipe`)."""
    return pattern == role or matches(pattern, name)


def named_roles(roles: Iterable[str]) -> str:
    """Return the roles of a model in words."""
    return ", ".join(sorted(set(roles) - {"other"}))
