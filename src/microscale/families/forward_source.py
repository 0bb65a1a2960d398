"""What the forward pass of a module's class does with the modules that it holds, read from its source.

A model is a stranger's code, and a record of its family need not exist. Two questions decide what may be done with a
linear layer: does its parent read its weight and multiply by itself (then the layer's own forward is never called, so
that nothing can be done to its inputs), and do its outputs choose experts. Both are answered without running the model,
which may have no weights yet. Only functions that ``forward`` reaches through ``self`` are read; a class whose source
cannot be had says nothing.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

from microscale.families.modules import is_linear

METADATA = frozenset({"dtype", "device", "shape", "ndim", "is_meta", "requires_grad", "layout", "is_cuda", "size"})
"""What a parent may ask of a weight without computing with its numbers."""

QUESTIONS = frozenset({"isinstance", "hasattr", "type", "id", "len"})
"""Functions that compute nothing with the numbers of their argument."""

CHOOSERS = frozenset({"topk", "argmax", "argsort", "sort"})
"""What picks experts from scores."""

EXPERT_COUNT = re.compile(r"expert")
"""A whole number in a config whose name has this word may be a number of experts."""


@functools.cache
def forward_functions(kind: type[nn.Module]) -> tuple[ast.AST, ...]:
    """Return the syntax trees of ``forward`` and of the methods that it reaches through ``self``."""
    found: dict[str, ast.AST] = {}
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        function = inspect.getattr_static(kind, name, None)
        if name in found or function is nn.Module.__dict__.get(name):
            continue
        tree = _tree_of(function)
        if tree is None:
            continue
        found[name] = tree
        waiting.extend(name for node in ast.walk(tree) if (name := _name_below_self(node)))
    return tuple(found.values())


def _tree_of(function: Any) -> ast.AST | None:
    function = getattr(function, "__func__", getattr(function, "fget", function))
    if not inspect.isfunction(function):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return None


def _name_below_self(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


@functools.cache
def read_weights(kind: type[nn.Module]) -> frozenset[str]:
    """Return the modules whose ``weight`` the forward pass of a class reads, by their names below it.

    ``*`` stands for one part of a name, where the class takes its modules from a list.
    """
    found: set[str] = set()
    for tree in forward_functions(kind):
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        names = dict(_aliases(tree))
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
                continue
            chain = _chain(node.value, names)
            if chain and not _is_question(parents.get(node)):
                found.add(chain)
    return frozenset(found)


def _is_question(parent: ast.AST | None) -> bool:
    """Whether what stands around a weight asks for its dtype and the like, not for its numbers."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in METADATA
    return isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in QUESTIONS


def _aliases(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the local names that stand for modules: ``proj = self.proj``, ``for layer in self.layers``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            chain = _chain(node.value, {})
            if chain:
                yield node.targets[0].id, chain
        elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
            chain = _chain(node.iter, {})
            if chain:
                yield node.target.id, f"{chain}.*"


def _chain(node: ast.AST, names: dict[str, str]) -> str | None:
    """Return the dotted name below ``self`` that an expression gives, or None; ``self`` itself is the empty name."""
    if isinstance(node, ast.Name):
        return "" if node.id == "self" else names.get(node.id)
    if isinstance(node, ast.Subscript):
        inner = _chain(node.value, names)
        return None if not inner else f"{inner}.*"
    if not isinstance(node, ast.Attribute):
        return None
    inner = _chain(node.value, names)
    return None if inner is None else f"{inner}.{node.attr}".lstrip(".")


def names_read_by_parents(model: nn.Module) -> frozenset[str]:
    """Return the linear layers whose weight the forward pass of a module above them reads.

    Mamba multiplies by ``dt_proj.weight`` itself, a router may take its classifier's weight in float32. Such a layer's
    own forward may never run.
    """
    modules = dict(model.named_modules())
    found: set[str] = set()
    for name, module in modules.items():
        for chain in read_weights(type(module)):
            full = f"{name}.{chain}".lstrip(".")
            pattern = re.compile(re.escape(full).replace(r"\*", r"[^.]+"))
            found.update({full} & modules.keys() if "*" not in chain else filter(pattern.fullmatch, modules))
    return frozenset(full for full in found if _multiplies(modules[full]))


def _multiplies(module: nn.Module) -> bool:
    """Whether a module is a linear layer, of floats or packed."""
    return is_linear(module) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


@functools.cache
def chooses(kind: type[nn.Module]) -> bool:
    """Whether the forward pass of a class picks places by score."""
    nodes = (node for tree in forward_functions(kind) for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(getattr(node.func, "attr", getattr(node.func, "id", "")) in CHOOSERS for node in nodes)


def expert_counts(model: nn.Module) -> frozenset[int]:
    """Return the numbers of experts that a model's config speaks of, and the sums of two of them.

    Some routers choose among experts of two kinds (Longcat: those that compute, and those that hand the input on).
    """
    counts: set[int] = set()
    waiting: list[Any] = [getattr(model, "config", None)]
    while waiting:
        entries = getattr(waiting.pop(), "__dict__", {})
        for key, value in entries.items():
            if hasattr(value, "model_type"):
                waiting.append(value)
            several = value if isinstance(value, list | tuple) else [value]
            is_count = EXPERT_COUNT.search(key) is not None
            counts.update(each for each in several if is_count and type(each) is int and each > 1)
    return frozenset(counts | {one + other for one in counts for other in counts if one != other})


def router_names(model: nn.Module) -> frozenset[str]:
    """Return the linear layers whose outputs choose experts.

    Such a layer has one output for each expert and lies in, or right below, a module that picks by score.
    """
    counts = expert_counts(model)
    found: set[str] = set()
    for name, module in model.named_modules():
        if counts and chooses(type(module)):
            near = [(key, child) for key, child in module.named_modules() if key.count(".") < 2]
            found.update(
                f"{name}.{key}".strip(".") for key, child in near if is_linear(child) and _num_outputs(child) in counts
            )
    return frozenset(found)


def _num_outputs(module: nn.Module) -> int:
    return int(getattr(module, "out_features", None) or getattr(module, "nf", 0))


def expert_stacks(model: nn.Module) -> dict[str, int]:
    """Return the parameters that hold a matrix for each expert, stacked [experts, …], with the number of experts."""
    counts = expert_counts(model)
    return {
        name: parameter.shape[0]
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
        and parameter.shape[0] in counts
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Conv1d)
    }
