"""The parts of a model that sees or hears: language, vision, audio, and the connector between them.

They are told apart by structure. The vision (audio) part is the module that has the model's ``vision_config``
(``audio_config``). The connector is whatever turns its outputs into the width of the language part: modules with linear
layers that belong to no tower, and mergers at the end of a tower. All else is language.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from microscale.errors import ModelError
from microscale.families.modules import is_linear, linear_names

PARTS = ("language", "vision", "audio", "connector", "all")
"""What can be asked for. ``all`` of a model with one tower is that tower."""

CONNECTING = re.compile(r"merger|project|connect|adapt|resampl|align|bridge")
"""What tells a connector inside of a tower whose own width is that of the language part."""


def is_inside(name: str, roots: Sequence[str]) -> bool:
    """Whether a module is one of others or lies in one."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def part_roots(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the outermost modules of each part but language, by the part's word; parts that are absent are left out.

    A connector may lie inside of a tower: what is in both belongs to the connector.
    """
    config: Any = getattr(model, "config", None)
    towers = {part: _with_config(model, getattr(config, f"{part}_config", None)) for part in ("vision", "audio")}
    roots = {part: found for part, found in towers.items() if found}
    if roots:
        connector = _mergers(model, roots) + _between(model, config, roots)
        roots |= {"connector": connector} if connector else {}
    return roots


def part_of(name: str, roots: Mapping[str, Sequence[str]]) -> str:
    """Return the part that a module belongs to, given the roots of the model's parts."""
    return next((part for part in ("connector", "vision", "audio") if is_inside(name, roots.get(part, ()))), "language")


def is_of_part(name: str, part: str, roots: Mapping[str, Sequence[str]]) -> bool:
    """Whether a module belongs to the part that was asked for."""
    return part in ("all", part_of(name, roots))


def check_part(model: nn.Module, part: str) -> None:
    """Refuse a part that a model does not have.

    Raises:
        ModelError: with the parts that it has.
    """
    if part not in PARTS:
        raise ModelError(f"part {part!r} of a model is unknown; possible: {', '.join(PARTS)}")
    present = ("language", *part_roots(model))
    if part not in ("all", *present):
        raise ModelError(f"{type(model).__name__} has no {part} part; its parts: {', '.join(present)}")


def _with_config(model: nn.Module, config: Any) -> tuple[str, ...]:
    """Return the outermost modules below the model that hold a config of the same class."""
    found: list[str] = []
    for name, module in model.named_modules():
        if config is None or isinstance(config, dict) or not name or is_inside(name, found):
            continue
        if type(getattr(module, "config", None)) is type(config):
            found.append(name)
    return tuple(found)


def _text_width(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", None)


def _mergers(model: nn.Module, roots: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the children of towers whose last linear layer gives the width of the language part."""
    width, found = _text_width(model), list[str]()
    for root in (root for part in roots.values() for root in part):
        tower = model.get_submodule(root)
        config: Any = getattr(tower, "config", None)
        own = {getattr(config, key, None) for key in ("hidden_size", "embed_dim", "d_model")}
        for key, child in tower.named_children():
            linears = linear_names(child)
            last = child.get_submodule(linears[-1]) if linears else None
            is_wide = last is not None and getattr(last, "out_features", None) == width
            if is_wide and (width not in own or CONNECTING.search(key)):
                found.append(f"{root}.{key}")
    return tuple(found)


def _between(model: nn.Module, config: Any, roots: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return the outermost modules with linear layers that belong neither to a tower nor to the language part."""
    towers = [root for part in roots.values() for root in part]
    language = list(_with_config(model, getattr(config, "text_config", None))) or _largest_stack(model, towers)
    for name, module in model.named_modules():
        if module in _ends(model):
            language.append(name)
    found: list[str] = []
    for name, module in model.named_modules():
        if not name or is_inside(name, [*towers, *language, *found]):
            continue
        holds_part = any(root.startswith(f"{name}.") for root in (*towers, *language))
        if not holds_part and any(is_linear(child) for child in module.modules()):
            found.append(name)
    return tuple(found)


def _ends(model: Any) -> list[nn.Module]:
    """Return the embeddings and the head of a model of transformers."""
    wanted = ("get_input_embeddings", "get_output_embeddings")
    found = [getattr(model, name)() for name in wanted if hasattr(model, name)]
    return [module for module in found if isinstance(module, nn.Module)]


def _largest_stack(model: nn.Module, towers: Sequence[str]) -> list[str]:
    """Return the list of modules outside of all towers that has the most parameters."""
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not is_inside(name, towers) and linear_names(module)
    }
    return [max(sizes, key=lambda name: sizes[name])] if sizes else []
