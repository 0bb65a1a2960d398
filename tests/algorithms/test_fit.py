"""Learning: batches that take every sample as often, the better of what was seen, errors, schedules of the rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from microscale.algorithms.fit import (
    FLOOR,
    Fitted,
    Judged,
    adam,
    cosine,
    epoch_batches,
    fit,
    hold_out,
    line,
    step_batches,
    warm_cosine,
)
from microscale.errors import CalibrationError


def parabola(lr: float, *, steps: int = 60, num_looks: int = 0, target: float = 3.0) -> tuple[Tensor, Fitted[float]]:
    """Go down (x - target)^2 from 0; a state is a number, its error the distance."""
    x = torch.zeros(1, requires_grad=True)

    def judge() -> Judged[float]:
        return Judged(state=float(x.detach()), error=abs(float(x.detach()) - 3.0))

    found = fit(
        [target] * steps,
        lambda wanted: (x - wanted).square().sum(),
        adam([([x], lr)]),
        parameters=[x],
        start=judge(),
        judge=judge,
        num_looks=num_looks,
        name="parabola",
    )
    return x, found


def test_it_goes_down() -> None:
    x, found = parabola(0.1, steps=200)
    assert abs(float(x.detach()) - 3.0) < 0.05 and found.best == found.last and x.grad is None


def test_the_best_state_that_was_seen_counts() -> None:
    _, away = parabola(0.2, target=-3.0)
    assert away.best.state == 0.0 and away.last.error > 3.0, "the start was better than the end"
    _, past = parabola(0.5, target=10.0, num_looks=20)
    assert past.best.error < min(past.last.error, 1.0), "one on the way was better than both"


def test_nothing_to_learn_from_is_the_start_judged_again() -> None:
    _, found = parabola(0.2, steps=0)
    assert found.best == found.last == Judged(state=0.0, error=3.0)


def test_a_state_without_a_number_is_no_better() -> None:
    found = fit(
        [0],
        lambda batch: torch.tensor(float(batch)),
        adam([([], 1.0)]),
        parameters=[],
        start=Judged(state="start", error=1.0),
        judge=lambda: Judged(state="end", error=math.nan),
        name="nothing",
    )
    assert found.best.state == "start" and found.last.state == "end"


def test_a_loss_that_left_the_numbers_is_named() -> None:
    with pytest.raises(CalibrationError, match="parabola: the loss became inf at step 0; a smaller lr may help"):
        parabola(0.1, target=math.inf)


def test_progress_counts_steps() -> None:
    seen: list[tuple[int, int]] = []
    state = Judged(state=None, error=0.0)
    fit(
        [1, 2, 3],
        lambda batch: torch.tensor(0.0),
        lambda step, steps: None,
        parameters=[],
        start=state,
        judge=lambda: state,
        name="nothing",
        progress=lambda step, steps: seen.append((step, steps)),
    )
    assert seen == [(0, 3), (1, 3), (2, 3)]


def counts_of(batches: list[Tensor], count: int) -> list[int]:
    return torch.bincount(torch.cat(batches), minlength=count).tolist()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_sample_comes_as_often(batch: int) -> None:
    per_order = -(-7 // batch)
    by_steps = step_batches(7, 3 * per_order, batch=batch, seed=1)
    assert len(by_steps) == 3 * per_order and counts_of(by_steps, 7) == [3] * 7
    assert counts_of(epoch_batches(7, 2, batch=batch, seed=1), 7) == [2] * 7
    part = epoch_batches(7, 1.5, batch=batch, seed=1)
    assert sum(map(len, part)) == round(1.5 * 7) and set(counts_of(part, 7)) == {1, 2}
    assert epoch_batches(7, 0, batch=batch, seed=1) == [] == step_batches(7, 0, batch=batch, seed=1)


def test_seeds_give_orders() -> None:
    one, again, other = (torch.cat(step_batches(32, 32, seed=seed)).tolist() for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (2, 1), (8, 1), (16, 2), (100, 4)])
def test_held_out_samples(count: int, held_out: int) -> None:
    learned, kept = hold_out(count, 5)
    assert len(kept) == held_out and sorted([*learned.tolist(), *kept.tolist()]) == list(range(count))


def test_schedules() -> None:
    steps = 100
    for schedule in (line, cosine):
        assert schedule(0, steps) == 1.0 and abs(schedule(steps, steps)) < 1e-12
        assert schedule(50, steps) == pytest.approx(0.5)
    warm = [warm_cosine(step, steps) for step in range(steps)]
    assert warm[0] < 0.2 and max(warm) > 0.97 and warm[-1] == pytest.approx(FLOOR, abs=1e-3)
    assert warm.index(max(warm)) < 10


def test_gradients_are_bounded_together() -> None:
    """Of a norm of 500 one of 1 is left, shared as before."""
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    for parameter, gradient in zip(parameters, (300.0, 400.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    adam([(parameters, 0.1)], max_norm=1.0)(0, 10)
    grads = [float(p.grad) for p in parameters if p.grad is not None]
    assert grads == pytest.approx([0.6, 0.8])
