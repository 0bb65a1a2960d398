"""The side path against the singular values of numpy and the matrix root of scipy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch

from method_problems import COLS, input_rows, layer_problem
from microscale.algorithms.contract import LayerProblem
from microscale.algorithms.low_rank import LowRankStep
from microscale.algorithms.rtn import Rtn
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError
from microscale.kernels import dequantize


def parts(layer: LayerProblem, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the error of rounding, and what the path gives back of it."""
    tensor = Rtn().quantize(layer)
    down, up = LowRankStep(rank=rank).side(layer, tensor)
    error = (layer.target - dequantize(tensor, torch.float32)).double().numpy()
    return error, (up.double() @ down.double()).numpy()


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_without_inputs_it_is_the_best_of_its_rank(rank: int) -> None:
    """Eckart and Young: what is left are the singular values behind the first."""
    error, path = parts(dataclasses.replace(layer_problem(), inputs=None), rank)
    left = np.linalg.svd(error, compute_uv=False)[rank:]
    assert np.linalg.norm(error - path) == pytest.approx(float(np.linalg.norm(left)), rel=1e-4)
    assert np.linalg.matrix_rank(path, tol=1e-6) == rank


@pytest.mark.parametrize("rank", [1, 8])
def test_with_inputs_it_is_the_best_for_the_outputs(rank: int) -> None:
    layer = layer_problem()
    moment = layer.second_moment
    assert moment is not None
    wide = moment.double().numpy()
    wide = wide + np.eye(COLS) * 1e-4 * np.diag(wide).mean()
    root = np.real(scipy.linalg.sqrtm(wide))
    error, path = parts(layer, rank)
    left = np.linalg.svd(error @ root, compute_uv=False)[rank:]
    assert np.linalg.norm((error - path) @ root) == pytest.approx(float(np.linalg.norm(left)), rel=1e-4)


@pytest.mark.parametrize(("rows", "rank", "kept"), [(48, 999, 48), (3, 16, 3), (1, 1, 1)])
def test_the_full_rank_gives_all_back(rows: int, rank: int, kept: int) -> None:
    layer = layer_problem(rows=rows)
    down, up = LowRankStep(rank=rank).side(layer, Rtn().quantize(layer))
    assert down.shape == (kept, COLS) and up.shape == (rows, kept)
    assert down.dtype == up.dtype == torch.float32
    error, path = parts(layer, rank)
    np.testing.assert_allclose(path, error, rtol=0, atol=2e-4 * np.abs(error).max())


def test_inputs_of_zeros_break_nothing() -> None:
    layer = layer_problem(inputs=torch.zeros(4, COLS))
    down, up = LowRankStep(rank=4).side(layer, Rtn().quantize(layer))
    assert bool(torch.isfinite(down).all()) and bool(torch.isfinite(up).all())


def test_a_weight_that_rounding_keeps_needs_no_path() -> None:
    weight = torch.tensor([0.5, -6.0, 3.0, 0.0]).repeat(48, COLS // 4)
    layer = dataclasses.replace(layer_problem(inputs=input_rows()), weight=weight)
    error, path = parts(layer, 4)
    assert not error.any() and not path.any()


def test_options() -> None:
    assert LowRankStep().wanted == Wanted.SECOND_MOMENT and LowRankStep(rank=4).text == "lowrank:rank=4"
    with pytest.raises(RecipeError, match="lowrank: rank is at least 1, got 0"):
        LowRankStep(rank=0)
