"""Embeddings in a plan: a head that is tied to one, so that a weight is used twice, and those that cannot be packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from microscale.families.embeddings import unfit_embeddings
from microscale.families.modules import is_linear, is_transposed
from microscale.layer_spec import LayerSpec
from microscale.nn.sizes import module_bytes, spec_bytes
from microscale.recipes.recipe import Recipe
from microscale.recipes.roles import is_meant


def tied_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the embeddings and linear layers that have one and the same weight, an embedding first.

    Weights that linear layers alone share are none of these.
    """
    names: dict[int, list[str]] = {}
    tables: set[str] = set()
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding)
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and (is_table or (is_linear(module) and not is_transposed(module))):
            names.setdefault(id(weight), []).append(name)
            tables |= {name} if is_table else set()
    groups = (sorted(members, key=lambda name: name not in tables) for members in names.values())
    return [tuple(members) for members in groups if len(members) > 1 and members[0] in tables]


def is_left_alone(name: str, role: str, recipe: Recipe) -> bool:
    """Whether a recipe says of a layer by itself that it stays as it is."""
    words = [rule.weights for rule in recipe.layer_rules if rule.weights and is_meant(rule.match, name, role)]
    is_excluded = any(is_meant(pattern, name, role) for pattern in recipe.exclude)
    return words[-1].record is None if words else is_excluded


def separation_note(model: nn.Module, group: Sequence[str], planned: Mapping[str, LayerSpec], why: str) -> str:
    """Say that what was one weight is stored several times, and what that costs."""
    sizes = [
        spec_bytes(planned[name].format, planned[name].shape)
        if name in planned
        else module_bytes(model.get_submodule(name))
        for name in group
    ]
    return (
        f"{' and '.join(group)} are one weight in the model and {len(group)} in the file, which makes it"
        f" {sum(sizes) - max(sizes):,} bytes larger: {why}"
    )


def unfit_notes(model: nn.Module, recipe: Recipe) -> list[str]:
    """Name the embeddings that were asked for beside others and cannot be quantized."""
    patterns = [*recipe.include, *(rule.match for rule in recipe.layer_rules if rule.weights is not None)]
    unfit = unfit_embeddings(model).items()
    asked = [(name, why) for name, why in unfit if any(is_meant(pattern, name, "embedding") for pattern in patterns)]
    return [f"{name} stays as it is: {why}" for name, why in asked]
