"""The logits of a batch as rows that are asked for: those of a large vocabulary need not be there all at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

MOST_ROWS = 1024
"""Rows that are looked at at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """The logits that predict the tokens of a batch but the first of each sample, row by row.

    ``rows_at`` gives those from one row up to another, and ``step`` is how many should be asked for at a time.
    """

    num_rows: int
    step: int
    rows_at: Callable[[int, int], Float[Tensor, "rows vocabulary"]]


def whole_predictions(logits: Float[Tensor, "samples tokens vocabulary"]) -> Predictions:
    """Return the predictions in logits that are there as a whole."""
    rows = logits[:, :-1].reshape(-1, logits.shape[-1])
    return Predictions(num_rows=rows.shape[0], step=MOST_ROWS, rows_at=lambda start, stop: rows[start:stop])
