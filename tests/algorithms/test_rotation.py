"""Rotations to start from: orthogonal for every size, Hadamard where the size is a power of two."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from method_problems import check_orthogonal
from microscale.algorithms.rotation import start_rotation
from small_models import same_bits


@pytest.mark.parametrize("size", [1, 2, 12, 32, 45])
def test_rotations_to_start_from(size: int) -> None:
    check_orthogonal(start_rotation(size, 3))
    assert same_bits(start_rotation(size, 3), start_rotation(size, 3))
    assert size < 12 or not torch.equal(start_rotation(size, 3), start_rotation(size, 4))


@pytest.mark.parametrize("size", [2, 8, 64])
def test_a_power_of_two_is_a_hadamard_matrix_with_signs_of_its_rows(size: int) -> None:
    found = start_rotation(size, 7).numpy()
    plain = scipy.linalg.hadamard(size) / np.sqrt(size)
    signs = found[:, :1] / plain[:, :1]
    assert set(np.round(signs.flatten(), 12)) <= {-1.0, 1.0}
    np.testing.assert_allclose(found, signs * plain, rtol=0, atol=1e-15)


@pytest.mark.parametrize("size", [3, 12, 45])
def test_any_other_size_is_the_unique_q_of_a_normal_matrix(size: int) -> None:
    """With a positive diagonal of R the decomposition has one answer only, whoever finds it."""
    normal = torch.randn(size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64).numpy()
    q, r = np.linalg.qr(normal)
    np.testing.assert_allclose(start_rotation(size, 3).numpy(), q * np.sign(np.diag(r)), atol=1e-12)


def test_it_is_float64() -> None:
    assert {start_rotation(size, 0).dtype for size in (1, 3, 4)} == {torch.float64}
    assert abs(start_rotation(1, 0).item()) == 1.0
