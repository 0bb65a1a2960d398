"""A sample of rows that misses no extreme one: squared errors are ruled by the few rows with massive activations."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from microscale.calibration.accumulators import Reservoir

DEFAULT_LARGEST = 64
DEFAULT_UNIFORM = 256


class TailSample:
    """The rows with the largest max |x|, all of them, and a uniform sample of the others.

    Weighted by :meth:`result`'s weights, a sum over the sample estimates the sum over all rows without bias, and
    exactly as far as the largest rows go. A row that larger ones push out of the first part enters the second as if
    it had come now. Choice and order depend on the seed and the order of rows.
    """

    def __init__(
        self, *, num_largest: int = DEFAULT_LARGEST, num_uniform: int = DEFAULT_UNIFORM, seed: int = 0
    ) -> None:
        self.num_largest = num_largest
        self.num_rows = 0
        self.random = np.random.default_rng(seed)
        self.others = Reservoir(1, torch.device("cpu"), num_uniform, seed)
        self.rows: Tensor | None = None
        self.scores = np.zeros(0)
        self.keys = np.zeros(0)

    def update(self, rows: Float[Tensor, "n cols"]) -> None:
        """Take in rows, which must be finite."""
        if not rows.shape[0]:
            return
        if self.rows is None:
            self.rows = rows.new_empty(0, rows.shape[1])  # not a view, which would keep the whole batch alive
            self.others.rows = self.rows
        self.num_rows += rows.shape[0]
        keys = self.random.random(rows.shape[0])
        scores = rows.abs().amax(1).to(torch.float64).cpu().numpy()
        is_full = self.scores.size == self.num_largest
        enters = scores > self.scores.min() if is_full else np.ones(scores.size, dtype=bool)
        self.others.offer(keys[~enters], _pick(rows, np.flatnonzero(~enters)))
        all_rows = torch.cat([self.rows, _pick(rows, np.flatnonzero(enters))])
        all_scores = np.concatenate([self.scores, scores[enters]])
        all_keys = np.concatenate([self.keys, keys[enters]])
        order = np.argsort(-all_scores, kind="stable")
        stay, leave = order[: self.num_largest], order[self.num_largest :]
        self.others.offer(all_keys[leave], _pick(all_rows, leave))
        self.rows, self.scores, self.keys = _pick(all_rows, stay), all_scores[stay], all_keys[stay]

    def result(self) -> tuple[Float[Tensor, "n cols"], Float[Tensor, "n"]]:
        """Return the rows and their weights in float64; at least one row must have come."""
        assert self.rows is not None
        num_sampled = self.others.rows.shape[0]
        rest = self.num_rows - self.rows.shape[0]
        weights = torch.ones(self.rows.shape[0] + num_sampled, dtype=torch.float64, device=self.rows.device)
        if num_sampled:
            weights[self.rows.shape[0] :] = rest / num_sampled
        return torch.cat([self.rows, self.others.rows]), weights


def _pick(rows: Tensor, positions: np.ndarray) -> Tensor:
    return rows[torch.from_numpy(positions).to(rows.device)]
