"""Which embeddings can be packed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from microscale.families.embeddings import embedding_obstacle, is_lookup


class ScaledByBuffer(nn.Embedding):
    def __init__(self, rows: int, cols: int, padding: int | None = None, scale: float = 3.0) -> None:
        super().__init__(rows, cols, padding)
        self.register_buffer("factor", torch.tensor(scale), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        factor = self.factor
        assert isinstance(factor, Tensor)
        return super().forward(input) * factor.to(self.weight.dtype)


class ScaledByNumber(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * math.sqrt(self.weight.shape[1])


class Shifted(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1)


class Normed(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(input), dim=-1)


class Offset(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.5


class ScaledByColumn(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        rows = super().forward(input)
        return rows * torch.arange(1, rows.shape[-1] + 1)


class Mixed(nn.Embedding):
    """A table that soft choices are multiplied with, beside look-ups."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight if input.is_floating_point() else super().forward(input)


class OfLengths(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.arange(input.shape[1]))


class WithParameter(nn.Embedding):
    def __init__(self, rows: int, cols: int) -> None:
        super().__init__(rows, cols)
        self.special = nn.Parameter(torch.zeros(cols))

    def forward(self, input: Tensor) -> Tensor:
        return torch.where((input == 19)[..., None], self.special, super().forward(input))


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(20, 4),
        nn.Embedding(20, 4, padding_idx=19),
        ScaledByBuffer(20, 4, padding=0),
        ScaledByBuffer(20, 4).to(torch.bfloat16),
        ScaledByBuffer(20, 4).to("meta"),
        ScaledByNumber(2, 3),
    ],
)
def test_look_ups_and_constants(module: nn.Embedding) -> None:
    before = copy.deepcopy(vars(module))
    assert embedding_obstacle(module) is None and is_lookup(module)
    assert vars(module).keys() == before.keys() and module.padding_idx == before["padding_idx"]
    assert module.weight.shape == before["_parameters"]["weight"].shape


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Embedding(20, 4, max_norm=1.0), "max_norm"),
        (Shifted(20, 4), "does not look rows up"),
        (Normed(20, 4), "does more than to multiply"),
        (Offset(20, 4), "does more than to multiply"),
        (ScaledByColumn(20, 4), "does more than to multiply"),
        (ScaledByBuffer(20, 4, scale=0.0), "does more than to multiply"),
        (Mixed(20, 4), "does more than to multiply"),
        (OfLengths(20, 4), "does not look rows up"),
        (WithParameter(20, 4), r"more than its table \(special\)"),
    ],
)
def test_what_is_no_look_up(module: nn.Embedding, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(embedding_obstacle(module))
    assert not is_lookup(module)
