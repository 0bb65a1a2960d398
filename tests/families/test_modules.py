"""Which modules are linear layers: torch's, GPT-2's, and those that only look like one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from microscale.families.modules import is_linear, is_transposed, linear_names


class Tagged(nn.Linear):
    """A linear layer with more to say, and the same to compute."""


class Scaled(nn.Linear):
    """It computes something else, so it must not be replaced by a product."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Rewritten(nn.Linear):
    """The same product in other words, as Falcon has it."""

    def forward(self, input: Tensor) -> Tensor:
        bias: Any = self.bias
        product = input @ self.weight.T
        return product if bias is None else product + bias


class Router(nn.Linear):
    """A layer that is built in a way of its own."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__(config["width"], config["experts"])

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).topk(1).values


class Misnamed(nn.Module):
    """A module with the name of GPT-2's layer, but without its width."""


Misnamed.__name__ = "Conv1D"


@pytest.mark.parametrize(
    ("module", "linear", "transposed"),
    [
        (nn.Linear(2, 3), True, False),
        (nn.Linear(2, 3, bias=False), True, False),
        (Tagged(2, 3), True, False),
        (Conv1D(3, 2), True, True),
        (Scaled(2, 3), False, False),
        (Rewritten(2, 3), True, False),
        (Router({"width": 2, "experts": 3}), False, False),
        (Misnamed(), False, False),
        (nn.Conv1d(2, 3, 1), False, False),
        (nn.Embedding(2, 3), False, False),
        (nn.Bilinear(2, 2, 3), False, False),
        (nn.Identity(), False, False),
    ],
    ids=lambda each: type(each).__qualname__ if isinstance(each, nn.Module) else "",
)
def test_what_is_a_linear_layer(module: nn.Module, linear: bool, transposed: bool) -> None:
    assert is_linear(module) is linear and is_transposed(module) is transposed


def test_what_counts_as_transposed_stores_its_weight_so() -> None:
    layer, inputs = Conv1D(3, 2), torch.randn(4, 2)
    torch.testing.assert_close(layer(inputs), inputs @ layer.weight + layer.bias)


def test_names_come_in_the_order_of_definition() -> None:
    module = nn.ModuleDict(
        {"z": nn.Linear(1, 1), "a": nn.Sequential(nn.ReLU(), Scaled(1, 1), Conv1D(1, 1), Tagged(1, 1))}
    )
    assert linear_names(module) == ["z", "a.2", "a.3"]
    assert linear_names(nn.Linear(1, 1)) == [""] and linear_names(nn.ReLU()) == []


def test_a_layer_that_stands_twice_is_named_once() -> None:
    shared = nn.Linear(1, 1)
    assert linear_names(nn.ModuleList([shared, shared])) == ["0"]
