"""Put modules in the place of others, and keep what transformers knows about tied weights true."""

from __future__ import annotations

from typing import Any

from torch import nn


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, by its dotted name."""
    parent_name, _, child_name = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child_name, module)


def untie(model: Any, quantized: set[str]) -> None:
    """Stop weight tying where one side of a tied pair is packed now: each side keeps its own weight."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(tied, dict) or not quantized:
        return
    kept: dict[str, str] = {}
    for target, source in tied.items():  # pyright: ignore[reportUnknownVariableType]
        sides = {str(target).removesuffix(".weight"), str(source).removesuffix(".weight")}  # pyright: ignore[reportUnknownArgumentType]
        if not sides & quantized:
            kept[str(target)] = str(source)  # pyright: ignore[reportUnknownArgumentType]
    if len(kept) != len(tied):  # pyright: ignore[reportUnknownArgumentType]
        model.all_tied_weights_keys = kept
        model.config.tie_word_embeddings = False
