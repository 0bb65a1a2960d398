"""Which layers a budget is spread over: roles, what is fixed by hand, and what is fused.

Every linear layer that a plan would quantize counts, those fixed by hand included: a fixed layer has one candidate.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from microscale.errors import AllocationError
from microscale.families.look_up import describe
from microscale.nn.attention_setting import parse_attention
from microscale.planning.candidates import Candidate, distinct_candidates, parse_candidate
from microscale.recipes.plan import make_plan, quantizable_modules
from microscale.recipes.recipe import KV_CACHE, NORM, make_recipe
from microscale.recipes.roles import is_meant, layer_roles, named_roles
from microscale.recipes.tying import tied_groups


class Grouping(Enum):
    """Which layers must get one format: each is free (SINGLE), or those that read one input go together (FUSED)."""

    SINGLE = "single"
    FUSED = "fused"


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatedLayer:
    """A layer with its role, the names it is fused with, and the candidates it may get (by index)."""

    name: str
    role: str
    kind: str
    shape: tuple[int, int]
    fused: tuple[str, ...]
    candidates: tuple[int, ...]

    @property
    def num_weights(self) -> int:
        """Weights of the layer."""
        return self.shape[0] * self.shape[1]


def parse_fixed(text: str) -> tuple[str, Candidate]:
    """Parse ``ROLE_OR_GLOB=WEIGHTS[/ACTIVATIONS]``, or ``kv_cache=FORMAT``.

    Raises:
        AllocationError: no ``=``, no formats, or a role whose numbers are never rounded.
        FormatError: a format that the cache cannot be rounded to.
    """
    pattern, equals, right = text.partition("=")
    if not (pattern and equals and right):
        raise AllocationError(f"--fix {text!r} must read ROLE=FORMAT or GLOB=FORMAT, e.g. mlp.down=mxfp8")
    candidate = parse_candidate(right)
    if pattern == NORM and not candidate.is_kept:
        raise AllocationError(f"--fix {text}: norms are not stored in a block format by a recipe; only norm=none")
    if pattern == KV_CACHE:
        if candidate.method is not None or str(candidate.activations or candidate.weights) != str(candidate.weights):
            raise AllocationError(f"--fix {text}: the KV cache has one format and no method, e.g. kv_cache=mxfp8")
        parse_attention(candidate.weights.record)
    return pattern, candidate


def allocated_layers(
    model: Any,
    candidates: Sequence[Candidate],
    *,
    fixed: Sequence[tuple[str, Candidate]] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    grouping: Grouping = Grouping.SINGLE,
) -> tuple[tuple[AllocatedLayer, ...], tuple[Candidate, ...]]:
    """Return the layers that a budget is spread over, and all candidates, those fixed by hand at the end.

    Raises:
        AllocationError: a fixed role or pattern that no layer has.
        ModelError, RecipeError: as :func:`microscale.recipes.plan.make_plan`.
    """
    fixed = [(pattern, candidate) for pattern, candidate in fixed if pattern not in (NORM, KV_CACHE)]
    every = distinct_candidates((*candidates, *(candidate for _, candidate in fixed)))
    places = {candidate.meaning: place for place, candidate in enumerate(every)}
    modules = quantizable_modules(model)
    roles, groups = layer_roles(model, modules), _groups(model)
    for pattern, _ in fixed:
        if not any(is_meant(pattern, name, roles[name]) for name in modules):
            present = named_roles(roles.values())
            raise AllocationError(f"--fix {pattern!r} is no role and matches no layer; roles of this model: {present}")
    base = next(c for c in every if not c.is_kept) if any(not c.is_kept for c in every) else None
    if base is None:
        raise AllocationError("all candidates leave layers alone; name a format to allocate")
    included = (*include, *(pattern for pattern, _ in fixed))
    recipe = make_recipe(format=base.weights, include=included, exclude=tuple(exclude))
    found: list[AllocatedLayer] = []
    planned = make_plan(model, recipe).layers
    partners = _one_weight(model, {layer.name for layer in planned})
    for layer in planned:
        if layer.name in partners.values():
            continue
        role = roles[layer.name]
        names = (layer.name, partners.get(layer.name, layer.name))
        meant = [c for pattern, c in fixed if any(is_meant(pattern, name, roles[name]) for name in names)]
        own = [places[candidate.meaning] for candidate in meant]
        fused = tuple(groups.get(layer.name, (layer.name,))) if grouping is Grouping.FUSED else (layer.name,)
        found.append(
            AllocatedLayer(
                name=layer.name,
                role=role,
                kind=layer.kind,
                shape=(layer.shape[0], layer.shape[1]),
                fused=fused,
                candidates=(own[-1],) if own else tuple(range(len(candidates))),
            )
        )
    return tuple(found), every


def _one_weight(model: Any, planned: Collection[str]) -> dict[str, str]:
    """Return by the name of a head the embedding whose weight it has, where both are planned: it counts once."""
    return {
        name: owner
        for owner, *others in tied_groups(model)
        for name in others[:1]
        if owner in planned and name in planned
    }


def _groups(model: Any) -> dict[str, list[str]]:
    """Return for every layer of a decoder layer those that read the same input, itself included."""
    found: dict[str, list[str]] = {}
    for block in describe(model).blocks:
        for group in block.groups:
            names = [f"{block.name}.{linear}" for linear in group.linears]
            found.update(dict.fromkeys(names, names))
    return found
