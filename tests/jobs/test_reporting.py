"""Who listens to a job: one function for the progress of all stages, notes for nobody."""

from __future__ import annotations

from microscale.jobs.reporting import SILENT, ProgressReporter


def test_progress_of_all_stages_goes_to_one_function() -> None:
    seen: list[tuple[int, int, str]] = []
    reporter = ProgressReporter(lambda *facts: seen.append(facts))
    for stage in ("measuring", "quantizing"):
        with reporter.stage(stage) as progress:
            progress(1, 2, stage)
        reporter.note("not told")
    assert seen == [(1, 2, "measuring"), (1, 2, "quantizing")]


def test_nobody_listens() -> None:
    with SILENT.stage("x") as progress:
        assert progress(1, 1, "y") is None
