"""Which embeddings only look rows up, or multiply them by one constant: found by trying them on a few rows."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

ROWS, COLS = 6, 8
UNKNOWN_CONSTANT = 2.0
"""Stands for a constant that is not there yet: of a model without weights, buffers lie on ``meta``."""


def is_table(module: nn.Module) -> bool:
    """Whether a module is an embedding with a float table; a packed one may keep the module that scales its rows."""
    return isinstance(module, nn.Embedding) and any(True for _ in module.parameters(recurse=False))


def is_lookup(module: nn.Module) -> bool:
    """Whether a module is an embedding that can be packed; see :func:`embedding_obstacle`."""
    return isinstance(module, nn.Embedding) and embedding_obstacle(module) is None


def unfit_embeddings(model: nn.Module) -> dict[str, str]:
    """Return why embeddings of a model cannot be packed, by the names of those."""
    tables = {name: module for name, module in model.named_modules() if is_table(module)}
    reasons = {name: embedding_obstacle(cast(nn.Embedding, module)) for name, module in tables.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def embedding_obstacle(module: nn.Embedding) -> str | None:
    """Return why an embedding cannot be packed, or None: it returns ``constant * table[indices]``.

    The forward of a subclass is run on a small table. What takes no indices, reads more than its table, moves or mixes
    rows, or takes floats too, is something else. ``padding_idx`` says where gradients are zero, and plays no part.
    """
    name = type(module).__name__
    if module.max_norm is not None:
        return f"{name} rescales rows while it looks them up (max_norm)"
    if type(module).forward is nn.Embedding.forward:
        return None
    others = sorted(key for key, _ in module.named_parameters() if key != "weight")
    if others:
        return f"{name} computes with more than its table ({others[0]})"
    indices = torch.tensor([[5, 0, 3], [1, 1, 4]], device="cpu")
    table = torch.linspace(-1.0, 2.0, ROWS * COLS, device="cpu").reshape(ROWS, COLS)
    found = _result(module, table, indices)
    if found is None or found.shape != (*indices.shape, COLS):
        return f"{name} does not look rows up by their indices alone"
    constant = found[0, 0, 0] / table[5, 0]
    is_scaled = torch.allclose(found, constant * table[indices], rtol=1e-5) and bool(constant != 0)
    if not is_scaled or _result(module, table, torch.ones(3, ROWS, device="cpu")) is not None:
        return f"{name} does more than to multiply the rows of its table by a constant"
    return None


def _result(module: nn.Embedding, table: Tensor, inputs: Tensor) -> Tensor | None:
    """Return what the class computes with another table, None where it fails; the module stays as it is."""
    tried = copy.copy(module)
    tried.padding_idx, tried.num_embeddings, tried.embedding_dim = None, ROWS, COLS
    buffers = {key: _at_hand(buffer) for key, buffer in module.named_buffers(recurse=False)}
    vars(tried).update(_parameters={"weight": nn.Parameter(table, requires_grad=False)}, _buffers=buffers)
    try:
        with torch.no_grad():
            found: Any = type(tried).forward(tried, inputs)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return None
    return found if isinstance(found, Tensor) else None


def _at_hand(buffer: Tensor) -> Tensor:
    if buffer.is_meta:
        return torch.full(buffer.shape, UNKNOWN_CONSTANT, dtype=buffer.dtype, device="cpu")
    return buffer.detach().to("cpu", torch.float32) if buffer.is_floating_point() else buffer.detach().to("cpu")
