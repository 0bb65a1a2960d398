"""Shapes are checked while the tests run: a wrong one inside the package is caught, and our own errors come first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.kernels.rounding_table import _place_of
from shape_checks import OFF_VARIABLE, WrongShape, check_class, checked

needs_checks = pytest.mark.skipif(OFF_VARIABLE in os.environ, reason=f"{OFF_VARIABLE} turns the checks off")


@checked
def product(left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner cols"] | None) -> Float[Tensor, "rows cols"]:
    return left.sum(1, keepdim=True) if right is None else left @ right.reshape(left.shape[1], -1)


@checked
def total(pieces: Sequence[Float[Tensor, "cols"]]) -> Float[Tensor, "cols"]:
    return sum(pieces, torch.zeros(()))


@checked
def refusing(values: Float[Tensor, "cols"]) -> None:
    if values.dim() != 1:
        raise MicroscaleError("a vector is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    left: Float[Tensor, "cols"]
    right: Float[Tensor, "cols"] | None = None

    @property
    def both(self) -> Float[Tensor, "2 cols"]:
        return self.left if self.right is None else torch.stack([self.left, self.right])


check_class(Pair)


def test_right_shapes_pass() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert total([torch.ones(3), torch.ones(3)]).tolist() == [2, 2, 2]
    assert Pair(left=torch.ones(3), right=torch.ones(3)).both.shape == (2, 3)


def test_wrong_arguments_results_and_fields() -> None:
    with pytest.raises(WrongShape, match=r"right is float32\[4, 3\]"):
        product(torch.ones(2, 3), torch.ones(4, 3))
    with pytest.raises(WrongShape, match=r"right is float32\[12\]"):
        product(torch.ones(2, 3), torch.ones(12))
    with pytest.raises(WrongShape, match="left is int64"):
        product(torch.ones(2, 3, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(WrongShape, match=r"pieces is list of float32\[\]"):
        total([torch.ones(())])
    with pytest.raises(WrongShape, match=r"right is float32\[4\]"):
        Pair(left=torch.ones(3), right=torch.ones(4))
    with pytest.raises(WrongShape, match=r"return is float32\[3\]"):
        _ = Pair(left=torch.ones(3)).both


def test_our_own_errors_come_first() -> None:
    with pytest.raises(MicroscaleError, match="vector"):
        refusing(torch.ones(2, 2))


@needs_checks
def test_a_wrong_shape_inside_the_package_is_caught() -> None:
    with pytest.raises(WrongShape, match=r"rounding_table._place_of: values is float32\[2, 2\]"):
        _place_of(torch.ones(2, 2))


def test_the_variable_turns_it_off() -> None:
    code = "import sys, shape_checks; shape_checks.install(); print(type(sys.meta_path[0]).__name__)"
    for words, is_on in (({}, True), ({OFF_VARIABLE: "1"}, False)):
        env = {**{k: v for k, v in os.environ.items() if k != OFF_VARIABLE}, **words}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=True
        )
        assert ("_Finder" in run.stdout) is is_on
