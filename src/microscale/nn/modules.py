"""The modules of a model: read a weight, put a module in the place of another, keep tied weights true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from microscale.families.modules import is_transposed


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
    for target, source in tied.items():
        sides = {str(target).removesuffix(".weight"), str(source).removesuffix(".weight")}
        if not sides & quantized:
            kept[str(target)] = str(source)
    if len(kept) != len(tied):
        model.all_tied_weights_keys = kept
        ends = [getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings")]
        names = {name for name, module in model.named_modules() if any(module is end for end in ends)}
        if names & quantized:  # others than head and embedding may be tied: layers that several blocks share
            model.config.tie_word_embeddings = False


def float_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight [out, in] in float32; it may share memory with the model."""
    weight = module.get_parameter("weight").detach()
    return (weight.T.contiguous() if is_transposed(module) else weight).to(torch.float32)


def tell_quantized(model: nn.Module) -> None:
    """Set the mark by which models of transformers know that they are quantized, as loading a checkpoint does.

    Some models (Falcon-Mamba, Jamba) then call a layer whose weight they otherwise multiply by themselves.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "model_type"):
            config._is_quantized = True


class KeptDtypes(nn.Module):
    """A module whose buffers keep their dtypes when the model is cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self
