"""Binding: a sequence of calls with fixed shapes and buffers is prepared once and run many times.

Every call goes to the backend that the dispatcher chooses for it. Consecutive calls of one backend are handed to its
``bind`` (prepared native calls, a captured graph); a backend without one runs its implementations, one after the other.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from microscale.errors import check_kind
from microscale.kernels.backend import Backend, Call, Operation, PlanStep
from microscale.kernels.dispatch import choose, execute, note_executions, why_not


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCall:
    """Who runs a call of a plan, and each other backend with its reason not to (None: it could)."""

    operation: Operation
    backend: str
    passed_over: dict[str, str | None]


class BoundPlan:
    """Calls bound to their backends; :meth:`run` runs them in order, on the memory that they were made with.

    A plan keeps the tensors of its calls, and the number of threads and the level of the moment it was bound.
    """

    def __init__(self, steps: Sequence[PlanStep], backends: Sequence[Backend]) -> None:
        self._steps = tuple(steps)
        self._runs = [step.run for step in steps]
        self._calls = [
            (call, backend.name)
            for call, backend in zip((call for step in steps for call in step.calls), backends, strict=True)
        ]
        self.executions = Counter((call.operation, name) for call, name in self._calls)

    def run(self) -> None:
        """Run all calls."""
        for run in self._runs:
            run()
        note_executions(self.executions)

    def timed_run(self) -> dict[str, float]:
        """Run all calls and return the seconds spent in each kind of step; kinds that one step joins share a name."""
        seconds: dict[str, float] = {}
        for step in self._steps:
            started = time.perf_counter()
            step.run()
            name = " + ".join(kind.value for kind in step.kinds)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
        note_executions(self.executions)
        return seconds

    def explain(self) -> tuple[PlannedCall, ...]:
        """Return which backend runs each call, and why not the others."""
        return tuple(
            PlannedCall(
                operation=call.operation,
                backend=name,
                passed_over={other: reason for other, reason in _reasons(call).items() if other != name},
            )
            for call, name in self._calls
        )


def _reasons(call: Call) -> dict[str, str | None]:
    """Return each backend's first reason among those for the parts of a call."""
    found: dict[str, str | None] = {}
    for request in call.requests:
        for name, reason in why_not(request).items():
            found[name] = found.get(name) or reason
    return found


def bind(calls: Sequence[Call | PlanStep]) -> BoundPlan:
    """Choose the backend of every call and prepare all of them; steps that are ready stand where they are.

    Raises:
        KernelError: no backend can run one of the calls.
        ArgumentError: something else than calls and steps.
    """
    check_kind(calls, (list, tuple), "what is bound", "a list of calls")
    for call in calls:
        check_kind(call, (Call, PlanStep), "each part of a plan", "a call, or a step that is ready")
    chosen = [(call, None if isinstance(call, PlanStep) else choose(*call.requests)) for call in calls]
    steps: list[PlanStep] = []
    for backend, found in groupby(chosen, key=lambda pair: pair[1]):
        group: list[Any] = [call for call, _ in found]
        steps += group if backend is None else _prepare(backend, group)
    return BoundPlan(steps, [backend for _, backend in chosen if backend is not None])


def _prepare(backend: Backend, calls: Sequence[Call]) -> Sequence[PlanStep]:
    if backend.bind is not None:
        return backend.bind(calls)
    return [
        PlanStep(
            kinds=(call.kind,),
            run=functools.partial(backend.implementations[call.operation], *call.arguments),
            calls=(call,),
        )
        for call in calls
    ]


def run(call: Call) -> None:
    """Run one call at once, on the backend that the dispatcher chooses."""
    execute(call.requests, *call.arguments)
