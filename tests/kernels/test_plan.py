"""Plans: who runs each call and why, with and without a binder; what is counted and timed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from microscale.errors import KernelError
from microscale.kernels import Gate, bind, count_executions, dispatch
from microscale.kernels.backend import Backend, Call, Operation, PlanStep, Request, StepKind
from microscale.kernels.decoder_ops import add_rms_norm, gate, linear_dense
from microscale.kernels.reference import BACKEND as REFERENCE
from small_models import same_bits


def toy_gate(pairs: Tensor, out: Tensor, kind: Gate) -> None:
    """A gate that leaves the activation out, to show that it ran."""
    del kind
    first, second = pairs.chunk(2, dim=-1)
    out.copy_(first * second)


def only_float32(request: Request) -> str | None:
    return None if request.dtype == torch.float32 else f"computes in float32 only, not {request.dtype}"


TOY = Backend(name="toy", title="toy", rank=1, implementations={Operation.GATE: toy_gate}, why_not=only_float32)


def bind_together(calls: Sequence[Call]) -> list[PlanStep]:
    """All calls in one step, as a graph is captured."""

    def run() -> None:
        for call in calls:
            REFERENCE.implementations[call.operation](*call.arguments)

    kinds = tuple(dict.fromkeys(call.kind for call in calls))
    return [PlanStep(kinds=kinds, run=run, calls=tuple(calls))]


CAPTURING = Backend(
    name="capturing",
    title="capturing",
    rank=1,
    implementations=REFERENCE.implementations,
    why_not=lambda _: None,
    bind=bind_together,
)


class Work:
    """Two numbers: norm, then a gate of them with themselves, then a product."""

    def __init__(self) -> None:
        self.residual = torch.tensor([[3.0, 4.0]])
        self.pairs, self.gated, self.out = torch.empty(1, 4), torch.empty(1, 2), torch.empty(1, 1)
        normed = torch.empty(1, 2)
        self.calls: list[Call | PlanStep] = [
            add_rms_norm(self.residual, None, torch.ones(2), 0.0, normed),
            PlanStep(kinds=(StepKind.LINEAR,), run=lambda: self.pairs.copy_(normed.repeat(1, 2))),
            gate(self.pairs, self.gated, Gate.SILU),
            linear_dense(self.gated, torch.ones(1, 2), None, self.out),
        ]


def test_a_backend_without_a_binder_runs_its_implementations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", [TOY, REFERENCE])
    work = Work()
    plan = bind(work.calls)
    assert [(call.operation, call.backend) for call in plan.explain()] == [
        (Operation.ADD_RMS_NORM, "reference"),
        (Operation.GATE, "toy"),
        (Operation.LINEAR_DENSE, "reference"),
    ]
    assert plan.explain()[0].passed_over == {"toy": "does not implement add_rms_norm"}
    assert plan.explain()[1].passed_over == {"reference": None}
    for scale in (1.0, 2.0):  # the same memory every time
        work.residual.copy_(torch.tensor([[3.0, 4.0]]) * scale)
        plan.run()
        assert float(work.out) == pytest.approx((9 + 16) / 12.5)  # squares of what has a mean of squares of 1


def test_runs_are_counted_where_someone_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", [TOY, REFERENCE])
    plan = bind([*Work().calls, *Work().calls])
    plan.run()
    with count_executions() as counts:
        plan.run()
        plan.timed_run()
    assert counts == {
        (Operation.ADD_RMS_NORM, "reference"): 4,
        (Operation.GATE, "toy"): 4,
        (Operation.LINEAR_DENSE, "reference"): 4,
    }


def test_a_binder_gets_consecutive_calls_and_may_join_them(monkeypatch: pytest.MonkeyPatch) -> None:
    work, expected = Work(), Work()
    monkeypatch.setattr(dispatch, "BACKENDS", [REFERENCE])
    bind(expected.calls).run()
    monkeypatch.setattr(dispatch, "BACKENDS", [CAPTURING, REFERENCE])
    plan = bind(work.calls)
    assert set(plan.timed_run()) == {"norms", "linears"}  # a step of its own stands between norm and gate
    assert same_bits(work.out, expected.out)
    plan = bind([call for call in work.calls if isinstance(call, Call)])
    assert set(plan.timed_run()) == {"norms + linears"}
    assert {call.backend for call in plan.explain()} == {"capturing"}


def test_a_call_that_nobody_runs_is_refused_when_it_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", [TOY])
    with pytest.raises(KernelError, match="toy: does not implement add_rms_norm"):
        bind(Work().calls)
    narrow = torch.ones(1, 4, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match=r"toy: computes in float32 only, not torch\.bfloat16"):
        bind([gate(narrow, narrow[:, :2].contiguous(), Gate.SILU)])
