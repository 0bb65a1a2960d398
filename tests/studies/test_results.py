"""What the rows of a study say: recovery, gap closure, the front."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_studies import Fake, score
from microscale.studies.file import Study, StudyTask
from microscale.studies.results import pareto_front, study_rows
from microscale.studies.run import PreparedModel, StudyRun, run_study
from microscale.studies.store import StudyScore, StudyStore


def test_recovery_and_gap_closure(study: Study, store: StudyStore) -> None:
    run_study(study, store, Fake())
    base, rtn8, rtn4, good = study_rows(study, store)[:4]
    assert base.recovery == pytest.approx(100) and base.bits_per_weight == 16.0
    book, piqa = good.cells
    assert book is not None and piqa is not None
    assert book.recovery == pytest.approx(100 * 20 / 21) and book.gap_closure == pytest.approx(75)
    assert piqa.metric == "acc" and piqa.stderr == 0.02
    assert piqa.recovery == pytest.approx(100 * 0.575 / 0.6) and piqa.gap_closure == pytest.approx(75)
    assert good.recovery == pytest.approx((100 * 20 / 21 + 100 * 0.575 / 0.6) / 2)
    assert good.gap_closure == pytest.approx(75) and rtn4.gap_closure == pytest.approx(0)
    assert rtn8.recovery == rtn4.recovery


def test_nan_and_inf(study: Study, store: StudyStore) -> None:
    class Broken(Fake):
        def score(self, prepared: PreparedModel, run: StudyRun, task: StudyTask) -> Sequence[StudyScore]:
            value = 20.0 if run.method is None else math.nan if run.format == "mxfp8" else math.inf
            return [score("perplexity", value, better="lower")]

    run_study(study, store, Broken())
    _, nan, inf = study_rows(study, store)[:3]
    assert nan.cells[0] is not None and nan.cells[0].value is None and nan.recovery is None
    assert inf.cells[0] is not None and inf.cells[0].value == math.inf and inf.cells[0].recovery == 0.0
    assert inf.gap_closure is None


POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12)


@given(POINTS)
def test_the_front_by_its_definition(points: list[tuple[float, float]]) -> None:
    def is_beaten(place: int) -> bool:
        cost, gain = points[place]
        return any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)

    front = pareto_front(points)
    assert {points[place] for place in front} == {p for place, p in enumerate(points) if not is_beaten(place)}
    assert [points[place][0] for place in front] == sorted(points[place][0] for place in front)
