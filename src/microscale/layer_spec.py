"""LayerSpec: what a quantized layer is, without its numbers; files, plans and modules say it with this record."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from microscale.formats import ActivationSpec, Format
from microscale.transforms import TransformSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One quantized weight and what its layer does around it.

    ``name`` is the module (``model.layers.0.mlp.up_proj``), ``shape`` the unpacked weight [rows, cols] (or
    [experts, rows, cols]), ``dtype`` the float type it was quantized from. ``method`` says how the codes were
    found (``rtn`` …). ``kind`` is ``linear``, ``conv1d`` (linear, but kept as [in, out] by the
    model), ``embedding`` or ``experts``. ``transforms`` act on the inputs at run time; ``low_rank`` is the rank of a
    side path, 0 for none. ``has_bias``: a module has one; a file holds it as a tensor by itself and does not say so.
    ``tied_to`` names the layer whose weight this one uses (a head: its embedding), None for a weight of its own.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    activations: ActivationSpec | None = None
    method: str = "rtn"
    kind: str = "linear"
    transforms: tuple[TransformSpec, ...] = ()
    low_rank: int = 0
    has_bias: bool = False
    tied_to: str | None = None
