"""Calibration: the windows of text that methods learn from, and how they are fed."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from microscale.families.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Windows of token ids, and how they are run: ``batch`` windows at a time.

    ``is_sequential``: quantized layers feed the next; else every decoder layer is measured on what the unquantized
    model gives, before any part of it is quantized. ``is_order_online``: orders of channels stay online even where they
    could be folded, so that every layer can stand alone among unquantized ones.
    """

    windows: Int[Tensor, "samples tokens"]
    batch: int = 4
    is_sequential: bool = True
    seed: int = 0
    is_order_online: bool = False

    @property
    def samples(self) -> Batch:
        """The windows as what a model is given."""
        return Batch(token_ids=self.windows)
