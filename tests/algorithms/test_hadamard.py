"""Block rotations: the size that fits, which groups, and signs that stay with the name of a layer."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from method_problems import group_problem, input_rows, layer_problem, random
from microscale.algorithms.hadamard import ROLES, Hadamard, fitting_size
from microscale.errors import RecipeError
from microscale.kernels.transform import apply_transforms
from small_models import same_bits


@pytest.mark.parametrize(
    ("cols", "wanted", "size"), [(64, 32, 32), (64, 128, 64), (40, 32, 8), (96, 64, 32), (7, 32, 1), (1, 16, 1)]
)
def test_the_size_that_fits(cols: int, wanted: int, size: int) -> None:
    assert fitting_size(cols, wanted) == size


@given(cols=st.integers(1, 10_000), power=st.integers(1, 7))
def test_it_is_the_largest_power_of_two_that_divides_the_width(cols: int, power: int) -> None:
    assert fitting_size(cols, 2**power) == max(2**i for i in range(power + 1) if cols % 2**i == 0)


@pytest.mark.parametrize(("cols", "size", "words"), [(64, 16, "hadamard(16)"), (40, 32, "hadamard(8)"), (33, 32, None)])
def test_the_transform_of_a_width(cols: int, size: int, words: str | None) -> None:
    found = Hadamard(size=size).transforms(group_problem(layer_problem(cols=cols, inputs=input_rows(cols=cols))))
    assert [str(transform.spec) for transform in found] == ([] if words is None else [words])


@pytest.mark.parametrize("signs", [False, True])
def test_it_turns_by_the_matrix_of_sylvester(signs: bool) -> None:
    chain = Hadamard(size=16, signs=signs).transforms(group_problem())
    x = random(3, 64, seed=2)
    flipped = x * chain[0].parts["scale"] if signs else x
    matrix = torch.from_numpy(scipy.linalg.hadamard(16)).to(torch.float32) / 4
    expected = (flipped.reshape(3, 4, 16) @ matrix).reshape(3, 64)
    torch.testing.assert_close(apply_transforms(x, chain), expected, rtol=1e-5, atol=1e-5)


def signs_of(name: str, **options: Any) -> torch.Tensor:
    scale, rotation = Hadamard(signs=True, **options).transforms(group_problem(layer_problem(name=name)))
    assert str(rotation.spec) == "hadamard(32)"
    return scale.parts["scale"]


def test_signs_belong_to_a_name_and_a_seed() -> None:
    found = signs_of("layers.0.up")
    assert set(found.tolist()) == {-1.0, 1.0}
    assert same_bits(found, signs_of("layers.0.up")), "the same in every run"
    assert not torch.equal(found, signs_of("layers.1.up")) and not torch.equal(found, signs_of("layers.0.up", seed=1))


@pytest.mark.parametrize(
    ("roles", "role", "is_turned"),
    [
        ("all", "mlp.down", True),
        ("down", "mlp.down", True),
        ("down", "moe.experts.down", True),
        ("mlp.down", "moe.experts.down", False),
        ("down", "mlp.gate_up", False),
        ("up", "mlp.gate_up", True),
        ("qkv", "attention.qkv", True),
    ],
)
def test_roles_choose_groups(roles: str, role: str, is_turned: bool) -> None:
    assert bool(Hadamard(roles=roles).transforms(group_problem(role=role))) is is_turned


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 24}, "hadamard: size is a power of two from 2 to 128, got 24"),
        ({"size": 1}, "got 1"),
        ({"size": 256}, "got 256"),
        ({"roles": "some"}, "hadamard: roles is one of all, qkv, out, gate_up, up, down, got 'some'"),
        ({"roles": ""}, "got ''"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Hadamard(**options)
    assert all(Hadamard(roles=role).roles == role for role in ROLES)
