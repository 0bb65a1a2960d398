"""GPTQ: its identities, and against a plain implementation of the paper's algorithm 1."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from method_problems import COLS, input_rows, layer_problem, statistics
from microscale.algorithms.gptq import Gptq, inverse_factor
from microscale.algorithms.rtn import Rtn
from microscale.calibration.statistics import InputStatistics, StatisticsCollector, Wanted
from microscale.errors import CalibrationError, NonFiniteError
from microscale.kernels import dequantize
from microscale.kernels.grid import ElementGrid
from small_models import same_bits

FORMATS = ["mxfp4", "mxfp4_plus", "mxfp4_plusplus", "nvfp4", "int4_asym", "mxfp6_e2m3", "e2m1/16x16:e8m0"]


def with_moment(moment: Tensor) -> InputStatistics:
    return dataclasses.replace(statistics(input_rows(4, moment.shape[0])), second_moment=moment)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("fmt", FORMATS)
def test_it_is_round_to_nearest_where_columns_do_not_depend_on_each_other(fmt: str, order: bool) -> None:
    moment = torch.diag(torch.rand(COLS, generator=torch.Generator().manual_seed(0)) + 0.1)
    layer = dataclasses.replace(layer_problem(fmt), inputs=with_moment(moment))
    found, expected = Gptq(order=order).quantize(layer), Rtn().quantize(layer)
    assert all(same_bits(part, expected.parts[name]) for name, part in found.parts.items())


def algorithm_1(weight: Tensor, moment: Tensor, damp: float, order: Tensor, grid: ElementGrid) -> Tensor:
    """GPTQ as the paper writes it, one column at a time, with the inverse updated by elimination (equation 3)."""
    wide = moment.to(torch.float64)
    wide = wide + torch.eye(len(wide), dtype=torch.float64) * damp * wide.diagonal().mean()
    inverse = torch.linalg.inv(wide)
    rest, rounded = weight.to(torch.float64).clone(), torch.zeros_like(weight, dtype=torch.float64)
    for place in order.tolist():
        column = rest[:, place : place + 1].to(torch.float32)
        value = grid.round(column, slice(place, place + 1)).to(torch.float64).squeeze(1)
        rounded[:, place] = value
        error = (rest[:, place] - value) / inverse[place, place]
        rest -= error.unsqueeze(1) * inverse[place].unsqueeze(0)
        inverse = inverse - torch.outer(inverse[:, place], inverse[place]) / inverse[place, place]
        inverse[place, place] = 1.0  # its row and column are zero now; it is not visited again
    return rounded.to(torch.float32)


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("fmt", FORMATS)
def test_it_is_algorithm_1(fmt: str, order: bool) -> None:
    layer = layer_problem(fmt, cols=160, rows=16, inputs=input_rows(400, 160))
    moment = layer.second_moment
    assert moment is not None
    visited = torch.argsort(moment.diagonal(), descending=True, stable=True) if order else torch.arange(160)
    grid = ElementGrid(layer.target, layer.format)
    expected = algorithm_1(layer.target, moment, 0.01, visited, grid)
    found = dequantize(Gptq(order=order).quantize(layer), torch.float32)
    # Float32 against float64: a number at the middle of two may fall to the other side, and take some more with it.
    assert float((found != expected).to(torch.float32).mean()) < 0.02
    assert not torch.equal(found, dequantize(Rtn().quantize(layer), torch.float32))


def test_a_singular_second_moment_is_mended_or_named() -> None:
    rank_one = layer_problem(inputs=input_rows(1))
    assert bool(torch.isfinite(dequantize(Gptq().quantize(rank_one), torch.float32)).all())
    zero = dataclasses.replace(layer_problem(), inputs=with_moment(torch.zeros(COLS, COLS)))
    assert torch.equal(dequantize(Gptq().quantize(zero)), dequantize(Rtn().quantize(zero)))
    with pytest.raises(CalibrationError, match=r"layers\.0\.up.*singular"):
        Gptq().quantize(dataclasses.replace(layer_problem(), inputs=with_moment(-torch.ones(COLS, COLS))))
    broken = torch.eye(COLS)
    broken[3, 3] = torch.nan
    with pytest.raises(CalibrationError, match=r"layers\.0\.up.*not finite"):
        Gptq().quantize(dataclasses.replace(layer_problem(), inputs=with_moment(broken)))


def test_the_factor_is_that_of_the_inverse() -> None:
    rows = input_rows(300)
    moment = rows.T @ rows / 300
    upper = inverse_factor(moment, 0.01, "x").to(torch.float64)
    dampened = moment.to(torch.float64) + torch.eye(COLS) * 0.01 * moment.diagonal().mean()
    torch.testing.assert_close(upper.T @ upper @ dampened, torch.eye(COLS, dtype=torch.float64), rtol=0, atol=1e-4)
    assert torch.equal(upper, upper.triu())


def test_nan_in_the_activations_is_named_where_they_are_measured() -> None:
    collector = StatisticsCollector(COLS, wanted=Wanted.SECOND_MOMENT, name="layers.0.up")
    with pytest.raises(NonFiniteError, match=r"layers\.0\.up"):
        collector.update(input_rows() * torch.nan)
