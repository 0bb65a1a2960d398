"""A study file, and an executor that makes scores up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from microscale.kernels import Operation
from microscale.kernels.dispatch import note_executions
from microscale.studies.file import StudyTask
from microscale.studies.run import PreparedModel, StudyRun
from microscale.studies.store import StudyScore

TEXT = """\
models: [a, {path: b/c, name: second}]
formats: [mxfp8, {weights: mxfp4, activations: none, name: w4}]
methods: [rtn, {method: gptq, name: good, formats: [w4]}]
tasks:
  - {text: book.txt, tokens: 100}
  - {task: piqa, limit: 5}
"""


LABELS = ["none unquantized", "mxfp8 rtn", "w4 rtn", "w4 good"]


class Fake:
    """Perplexity 20 unquantized, 24 by RTN, 21 by another method; accuracies 0.6, 0.5, 0.575; breaks where told to."""

    def __init__(self, breaks: Callable[[StudyRun, str], BaseException | None] = lambda run, step: None) -> None:
        self.breaks = breaks
        self.log: list[str] = []

    def _note(self, run: StudyRun, step: str) -> None:
        self.log.append(f"{run.label}: {step}")
        error = self.breaks(run, step)
        if error is not None:
            raise error

    machine: str = "a test"

    def prepare(self, run: StudyRun) -> PreparedModel:
        self._note(run, "prepare")
        return PreparedModel(model=run, bits_per_weight=16.0 if run.weights is None else 4.25, num_bytes=1000)

    def score(self, prepared: PreparedModel, run: StudyRun, task: StudyTask) -> Sequence[StudyScore]:
        self._note(run, task.label)
        kind = 0 if run.method is None else 1 if str(run.method.method) == "rtn" else 2
        if task.text is not None:
            return [score("perplexity", (20.0, 24.0, 21.0)[kind], better="lower")]
        return [score("acc_norm", 0.1, is_main=False), score("acc", (0.6, 0.5, 0.575)[kind], stderr=0.02)]


def score(metric: str, value: float, *, better: str = "higher", is_main: bool = True, stderr: Any = None) -> StudyScore:
    return StudyScore(
        task_key="",
        metric=metric,
        value=value,
        stderr=stderr,
        samples=5,
        is_main=is_main,
        is_higher_better=better == "higher",
        seconds=0.0,
    )


def stop_at(label: str, step: str, error: BaseException) -> Callable[[StudyRun, str], BaseException | None]:
    return lambda run, now: error if (run.label, now) == (label, step) else None


class Running(Fake):
    """Runs one linear call for each score of a quantized model."""

    def score(self, prepared: PreparedModel, run: StudyRun, task: StudyTask) -> Sequence[StudyScore]:
        if run.method is not None:
            note_executions(Counter({(Operation.LINEAR, "here"): 3}))
        return super().score(prepared, run, task)
