"""Learning, written once: batches, the loop of steps down a gradient, schedules of the rate, the better state kept.

What is learned, from what and by which loss is the caller's; nothing here knows a format or a layer. A state is what
the caller calls one: it is judged from the start on, and the best that was seen is what counts.

Left out: several devices, and gradients that are gathered over batches.

Source: arXiv 1711.05101 (AdamW), arXiv 1608.03983 (the cosine).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from microscale.errors import CalibrationError

BatchT = TypeVar("BatchT")
StateT = TypeVar("StateT")

Schedule = Callable[[int, int], float]
"""Of (step, steps) to the share of a rate."""
Update = Callable[[int, int], None]
"""Called with (step, steps): changes the parameters by their gradients."""

WARM_UP = 0.05
"""Share of the steps over which :func:`warm_cosine` rises."""
FLOOR = 0.05
"""Share of the rate that :func:`warm_cosine` ends at."""
MOST_HELD_OUT, HELD_OUT_SHARE = 4, 8
"""Samples that nothing learns from: one in eight, and at most four."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged(Generic[StateT]):
    """A state and its error."""

    state: StateT
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted(Generic[StateT]):
    """The best state that was seen, and the last one."""

    best: Judged[StateT]
    last: Judged[StateT]


def fit(
    batches: Sequence[BatchT],
    loss_of: Callable[[BatchT], Float[Tensor, ""]],
    update: Update,
    *,
    parameters: Sequence[Tensor],
    start: Judged[StateT],
    judge: Callable[[], Judged[StateT]],
    num_looks: int = 0,
    name: str,
    remedy: str = "a smaller lr may help",
    progress: Callable[[int, int], None] | None = None,
) -> Fitted[StateT]:
    """Take one step for each batch; return the best of the start and of the states that ``judge`` saw.

    ``judge`` is asked ``num_looks`` times from the first step on, evenly spread, and at the end. Of equal errors the
    later state counts. ``name`` and ``remedy`` are for the error's text, ``progress`` gets (step, steps).

    Special values: a state whose error is NaN is never better. A loss without a gradient changes nothing.

    Raises:
        CalibrationError: the loss left the finite numbers.
    """
    steps, best = len(batches), start
    looks = {i * steps // num_looks for i in range(num_looks)} if steps else set[int]()
    for step, batch in enumerate(batches):
        if progress is not None:
            progress(step, steps)
        if step in looks:
            best = _better(best, judge())
        loss = loss_of(batch)
        if not bool(torch.isfinite(loss)):
            raise CalibrationError(f"{name}: the loss became {loss.item()} at step {step}; {remedy}")
        if loss.requires_grad:
            loss.backward()
            update(step, steps)
        for parameter in parameters:
            parameter.grad = None
    last = judge()
    return Fitted(best=_better(best, last), last=last)


def _better(best: Judged[StateT], found: Judged[StateT]) -> Judged[StateT]:
    return found if found.error <= best.error else best


def _orders(count: int, seed: int) -> Iterator[Int[Tensor, "count"]]:
    """Yield one random order of samples after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(count, generator=generator)


def step_batches(count: int, steps: int, *, batch: int = 1, seed: int) -> list[Int[Tensor, "batch"]]:
    """Return the samples of ``steps`` batches, each sample as often as the others; of an order the rest comes first."""
    found = (part for order in _orders(count, seed) for part in reversed(order.split(batch)))
    return list(itertools.islice(found, steps))


def epoch_batches(count: int, epochs: float, *, batch: int = 1, seed: int) -> list[Int[Tensor, "batch"]]:
    """Return the samples of the batches of ``epochs`` orders; the last one may be cut short."""
    left = round(epochs * count)
    found: list[Tensor] = []
    for order in _orders(count, seed):
        if left <= 0:
            break
        found.extend(order[:left].split(batch))
        left -= count
    return found


def hold_out(count: int, seed: int) -> tuple[Int[Tensor, "learned"], Int[Tensor, "held_out"]]:
    """Return the samples that are learned from, and those that are held out (none of a single one)."""
    held_out = min(MOST_HELD_OUT, max(1, count // HELD_OUT_SHARE)) if count > 1 else 0
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held_out:].sort().values, order[:held_out].sort().values


def line(step: int, steps: int) -> float:
    """Return the share of a rate that falls to 0 in a straight line."""
    return 1.0 - step / steps


def cosine(step: int, steps: int) -> float:
    """Return the share of a rate along half a cosine down to 0."""
    return 0.5 * (1 + math.cos(math.pi * (step / steps)))


def warm_cosine(step: int, steps: int) -> float:
    """Return the share of a rate: a short rise, then half a cosine down to :data:`FLOOR`."""
    rise = min(1.0, (step + 1) / (WARM_UP * steps + 1))
    return rise * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def adam(
    parts: Sequence[tuple[Sequence[Tensor], float]],
    *,
    schedule: Schedule = cosine,
    betas: tuple[float, float] = (0.9, 0.999),
    max_norm: float = math.inf,
) -> Update:
    """Return an update by AdamW without decay, for parameters with their rates.

    Gradients whose common norm is above ``max_norm`` are scaled down to it.
    """
    groups: list[dict[str, Any]] = [{"params": list(tensors), "lr": rate} for tensors, rate in parts if tensors]
    if not groups:
        return lambda step, steps: None
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=0.0)
    rates = [float(group["lr"]) for group in groups]
    parameters = [tensor for group in groups for tensor in group["params"]]

    def update(step: int, steps: int) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(step, steps)
        if max_norm < math.inf:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()

    return update
