"""What is summed up over the tokens of a layer: one small class for each statistic, fed in one pass.

Each takes rows [n, cols] that are known to be finite, and can be merged with another of its kind: two passes over
halves of a text give what one pass over the whole gives, up to rounding.

Source: P. Pébay, "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order statistical
moments", SAND2008-6212 (the merging of central moments, equations 3.1 ff.); Chan, Golub and LeVeque 1979.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from microscale.calibration.histogram import HistogramSketch


class MeanAbs:
    """The sum of magnitudes for each channel."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self.total = torch.zeros(cols, dtype=torch.float64, device=device)

    def update(self, rows: Float[Tensor, "n cols"]) -> None:
        self.total += rows.abs().sum(0)  # in the rows' dtype for one batch, in float64 across batches

    def merge(self, other: MeanAbs) -> None:
        self.total += other.total.to(self.total.device)


class Moments:
    """Mean and central moments of order two to four for each channel, in float64."""

    def __init__(self, cols: int, device: torch.device) -> None:
        self.count = 0
        self.mean, self.m2, self.m3, self.m4 = (torch.zeros(cols, dtype=torch.float64, device=device) for _ in range(4))

    def update(self, rows: Float[Tensor, "n cols"]) -> None:
        wide = rows.to(torch.float64)
        mean = wide.mean(0)
        centred = wide - mean
        squared = centred.square()
        m2 = squared.sum(0)
        m3 = centred.mul_(squared).sum(0)
        m4 = squared.square_().sum(0)
        self._combine(rows.shape[0], mean, m2, m3, m4)

    def merge(self, other: Moments) -> None:
        if other.count:
            device = self.mean.device
            self._combine(other.count, *(part.to(device) for part in (other.mean, other.m2, other.m3, other.m4)))

    def _combine(self, count: int, mean: Tensor, m2: Tensor, m3: Tensor, m4: Tensor) -> None:
        a, b = self.count, count
        n = a + b
        delta = mean - self.mean
        part = delta / n
        self.m4 = (
            (self.m4 + m4)
            + delta * part**3 * (a * b * (a * a - a * b + b * b))
            + 6 * part**2 * (a * a * m2 + b * b * self.m2)
            + 4 * part * (a * m3 - b * self.m3)
        )
        self.m3 = (self.m3 + m3) + delta * part**2 * (a * b * (a - b)) + 3 * part * (a * m2 - b * self.m2)
        self.m2 = (self.m2 + m2) + delta * part * (a * b)
        self.mean = self.mean + part * b
        self.count = n


class SecondMoment:
    """The sum of x^T x in float32; only blocks on and right of the diagonal are computed, for it is symmetric.

    Each block of ``block_cols`` columns is added in place, so nothing as large as the matrix is ever needed beside it.
    """

    def __init__(self, cols: int, device: torch.device, block_cols: int) -> None:
        self.block_cols = block_cols
        self.upper = torch.zeros(cols, cols, dtype=torch.float32, device=device)

    def update(self, rows: Float[Tensor, "n cols"]) -> None:
        cols = self.upper.shape[0]
        values = rows.to(torch.float32)
        for start in range(0, cols, self.block_cols):
            stop = min(start + self.block_cols, cols)
            self.upper[start:stop, start:].addmm_(values[:, start:stop].T, values[:, start:])

    def merge(self, other: SecondMoment) -> None:
        # The other's blocks may be larger or smaller, but what both need, on and above the diagonal, both have.
        self.upper += other.upper.to(self.upper.device)

    def mean(self, count: int) -> Float[Tensor, "cols cols"]:
        """Return the whole symmetric matrix divided by the number of tokens."""
        cols = self.upper.shape[0]
        matrix = self.upper / max(count, 1)
        for start in range(0, cols, self.block_cols):
            stop = min(start + self.block_cols, cols)
            square = matrix[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).T)  # exactly symmetric, which a matrix product need not be
            matrix[stop:, start:stop] = matrix[start:stop, stop:].T
        return matrix


class Reservoir:
    """A uniform sample of rows: each row draws a random key, and those with the largest keys stay.

    The choice depends on the seed and the order of rows only, not on how they were batched. A merge keeps the largest
    keys of both, so collectors that are to be merged need different seeds, or they choose the same positions.
    """

    def __init__(self, cols: int, device: torch.device, size: int, seed: int) -> None:
        self.size = size
        self.random = np.random.default_rng(seed)
        self.keys = np.zeros(0)
        self.rows = torch.zeros(0, cols, device=device)

    def update(self, rows: Float[Tensor, "n cols"]) -> None:
        self.offer(self.random.random(rows.shape[0]), rows)

    def merge(self, other: Reservoir) -> None:
        self.offer(other.keys, other.rows.to(self.rows.device))

    def offer(self, keys: np.ndarray, rows: Tensor) -> None:
        """Keep the rows with the largest keys among those at hand and these."""
        if self.keys.size == self.size and self.size:
            chosen = np.flatnonzero(keys > self.keys.min())  # most rows of a long text never enter
            keys, rows = keys[chosen], rows[torch.from_numpy(chosen).to(rows.device)]
        if not keys.size:
            return
        all_keys = np.concatenate([self.keys, keys])
        all_rows = torch.cat([self.rows.to(rows.dtype), rows])
        order = np.sort(np.argsort(-all_keys, kind="stable")[: self.size])  # in the order of the text
        self.keys = all_keys[order]
        self.rows = all_rows[torch.from_numpy(order).to(rows.device)]


class Crest:
    """Crest factors max |x| / rms of blocks, their mean and maximum over the tokens for each block position.

    A block of zeros has none and is not counted. The last block may be shorter.
    """

    def __init__(self, cols: int, device: torch.device, block_size: int) -> None:
        self.block_size = block_size
        blocks = -(-cols // block_size)
        self.total = torch.zeros(blocks, dtype=torch.float64, device=device)
        self.count = torch.zeros(blocks, dtype=torch.int64, device=device)
        self.largest = torch.zeros(blocks, dtype=torch.float32, device=device)

    def update(self, rows: Float[Tensor, "n cols"]) -> None:
        cols = rows.shape[1]
        whole = cols - cols % self.block_size
        self._add(rows[:, :whole].unflatten(1, (-1, self.block_size)), slice(0, whole // self.block_size))
        if whole < cols:
            self._add(rows[:, None, whole:], slice(whole // self.block_size, None))

    def _add(self, blocks: Float[Tensor, "n blocks size"], where: slice) -> None:
        if not blocks.numel():
            return
        magnitudes = blocks.to(torch.float32).abs()
        amax = magnitudes.amax(-1)
        # Divided by the largest first, squares neither overflow nor vanish; two steps, for 1 / amax may overflow.
        relative = magnitudes / amax.unsqueeze(-1)
        crest = relative.square().mean(-1).rsqrt()
        crest = torch.where(amax > 0, crest, 0.0)
        self.total[where] += crest.sum(0, dtype=torch.float64)
        self.count[where] += (amax > 0).sum(0)
        self.largest[where] = torch.maximum(self.largest[where], crest.amax(0))

    def merge(self, other: Crest) -> None:
        device = self.total.device
        self.total += other.total.to(device)
        self.count += other.count.to(device)
        self.largest = torch.maximum(self.largest, other.largest.to(device))


class Histogram:
    """The histogram of all magnitudes of the layer's input."""

    def __init__(self, device: torch.device) -> None:
        self.sketch = HistogramSketch.empty(device)

    def update(self, rows: Float[Tensor, "n cols"]) -> None:
        self.sketch = self.sketch.merge(HistogramSketch.of(rows))

    def merge(self, other: Histogram) -> None:
        self.sketch = self.sketch.merge(other.sketch)
