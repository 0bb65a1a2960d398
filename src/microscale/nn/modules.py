"""The modules of a model: read a weight, put a module in the place of another, keep tied weights true."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from microscale.families.modules import is_transposed
from microscale.tensor import QuantizedTensor


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, by its dotted name."""
    parent_name, _, child_name = name.rpartition(".")
    setattr(model.get_submodule(parent_name), child_name, module)


def untie(model: Any, quantized: Collection[str], tied: Collection[str] = ()) -> None:
    """Stop transformers from tying weights of which one side is packed now.

    Each side keeps its own weight, or uses that of another packed module (``tied``: the names of those that do).
    """
    sides = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(sides, dict) or not quantized:
        return
    kept = _without(sides, "", quantized)
    for name, module in model.named_modules():
        own: Any = getattr(module, "_tied_weights_keys", None)
        if isinstance(own, dict):  # from these, transformers makes the others anew
            module._tied_weights_keys = _without(own, f"{name}." if name else "", quantized)
    if len(kept) != len(sides):
        model.all_tied_weights_keys = kept
        ends = [getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings")]
        names = {name for name, module in model.named_modules() if any(module is end for end in ends)}
        # others than head and embedding may be tied: layers that several blocks share
        if names & set(quantized) and not names & set(tied):
            model.config.tie_word_embeddings = False


def _without(sides: Mapping[Any, Any], prefix: str, quantized: Collection[str]) -> dict[str, str]:
    """Return the pairs of tied weights, target to source, that no packed module takes part in."""
    names = set(quantized)
    return {
        str(target): str(source)
        for target, source in sides.items()
        if not names & {f"{prefix}{side}".removesuffix(".weight") for side in (str(target), str(source))}
    }


def float_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight [out, in] in float32; it may share memory with the model."""
    weight = module.get_parameter("weight").detach()
    return (weight.T.contiguous() if is_transposed(module) else weight).to(torch.float32)


STORED = "microscale_stored"
"""Under which name a float module keeps the packed weight that it was expanded from."""


def keep_stored(module: nn.Module, tensor: QuantizedTensor) -> None:
    """Remember the packed weight (row_major) that a float module is expanded from."""
    module.__dict__[STORED] = tensor


def stored_of(module: nn.Module) -> QuantizedTensor | None:
    """Return the packed weight that a float module was expanded from; the module may have changed since."""
    return module.__dict__.get(STORED)


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
