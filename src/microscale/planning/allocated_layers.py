"""Which layers a budget is spread over: roles, what is fixed by hand, and what is fused.

Every linear layer that a plan would quantize counts, those fixed by hand included: a fixed layer has one candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from microscale.errors import AllocationError
from microscale.families import describe
from microscale.nn import parse_attention
from microscale.planning.candidates import Candidate, parse_candidate
from microscale.recipes import make_plan, make_recipe, matches, quantizable_modules
from microscale.recipes.recipe import KV_CACHE, NONE

ROLES = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down", "embedding", "norm", "lm_head", KV_CACHE)


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
    if pattern == "norm" and not candidate.is_kept:
        raise AllocationError(f"--fix {text}: norms are not stored in a block format by a recipe; only norm={NONE}")
    if pattern == KV_CACHE:
        if candidate.method is not None or candidate.activations not in (None, candidate.weights):
            raise AllocationError(f"--fix {text}: the KV cache has one format and no method, e.g. kv_cache=mxfp8")
        parse_attention(candidate.weights)
    return pattern, candidate


def allocated_layers(
    model: Any,
    candidates: Sequence[Candidate],
    *,
    fixed: Sequence[tuple[str, Candidate]] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    is_fused: bool = False,
) -> tuple[tuple[AllocatedLayer, ...], tuple[Candidate, ...]]:
    """Return the layers that a budget is spread over, and all candidates, those fixed by hand at the end.

    Raises:
        AllocationError: a fixed role or pattern that no layer has.
        ModelError, RecipeError: as :func:`microscale.recipes.make_plan`.
    """
    fixed = [(pattern, candidate) for pattern, candidate in fixed if pattern not in ("norm", KV_CACHE)]
    every = list(candidates)
    for _, candidate in fixed:
        if candidate not in every:
            every.append(candidate)
    modules = quantizable_modules(model)
    roles, groups = _roles(model, modules)
    wanted = [name for name in modules if any(_is_meant(pattern, name, roles) for pattern, _ in fixed)]
    for pattern, _ in fixed:
        if not any(_is_meant(pattern, name, roles) for name in modules):
            present = ", ".join(sorted(set(roles.values())))
            raise AllocationError(f"--fix {pattern!r} is no role and matches no layer; roles of this model: {present}")
    for word, pattern in [*(("include", p) for p in include), *(("exclude", p) for p in exclude)]:
        if not any(matches(pattern, name) or (word, roles[name]) == ("include", pattern) for name in modules):
            present = ", ".join(sorted(set(roles.values())))
            raise AllocationError(f"--{word} {pattern!r} matches no layer; roles of this model: {present}")
    included = [name for name in modules if any(matches(p, name) or roles[name] == p for p in include)]
    base = next(c for c in every if not c.is_kept) if any(not c.is_kept for c in every) else None
    if base is None:
        raise AllocationError("all candidates leave layers alone; name a format to allocate")
    recipe = make_recipe(
        format=base.weights, include=tuple(dict.fromkeys([*included, *wanted])), exclude=tuple(exclude)
    )
    found: list[AllocatedLayer] = []
    for layer in make_plan(model, recipe).layers:
        own = [every.index(candidate) for pattern, candidate in fixed if _is_meant(pattern, layer.name, roles)]
        fused = tuple(groups.get(layer.name, (layer.name,))) if is_fused else (layer.name,)
        found.append(
            AllocatedLayer(
                name=layer.name,
                role=roles[layer.name],
                kind=layer.kind,
                shape=layer.shape,
                fused=fused,
                candidates=(own[-1],) if own else tuple(range(len(candidates))),
            )
        )
    return tuple(found), tuple(every)


def _is_meant(pattern: str, name: str, roles: Mapping[str, str]) -> bool:
    return roles[name] == pattern or (pattern not in ROLES and matches(pattern, name))


def _roles(model: Any, modules: Mapping[str, tuple[str, nn.Module]]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return the role of every layer, and the layers that share an input with it, its kind of work included."""
    structure = describe(model)
    roles: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for block in structure.blocks:
        for group in block.groups:
            names = [f"{block.name}.{linear}" for linear in group.linears]
            for name in names:
                roles[name], groups[name] = group.role, names
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, (kind, module) in modules.items():
        if name not in roles:
            roles[name] = "embedding" if kind == "embedding" else "lm_head" if module is head else "other"
    return roles, groups
