"""What no method can do, said by its chain alone: before any text or weight is read."""

from __future__ import annotations

from collections.abc import Iterable

from microscale.algorithms.contract import ModelStep, RefineStep, RotationStep
from microscale.algorithms.pipeline import Pipeline
from microscale.errors import CalibrationError


def refuse_whole(pipelines: Iterable[Pipeline]) -> None:
    """Refuse steps that work on the whole model at once; for models whose layers are read one by one.

    Raises:
        CalibrationError: with the step and the remedy.
    """
    for pipeline in pipelines:
        whole = [step for kind in (ModelStep, RefineStep, RotationStep) for step in pipeline.of_kind(kind)]
        if whole:
            raise CalibrationError(
                f"method {pipeline.text}: {whole[0].name} works on the whole model at once, but with --offload its"
                " layers are read one by one; leave --offload out, or take another method"
            )


def refuse_without_text(pipelines: Iterable[Pipeline]) -> None:
    """Refuse chains that learn from text; for jobs without any.

    Raises:
        CalibrationError: with the methods and the remedy.
    """
    names = ", ".join(pipeline.text for pipeline in pipelines if pipeline.needs_calibration)
    if names:
        raise CalibrationError(
            f"method {names} needs calibration text: give --calibration FILE (calibration=... in Python)"
        )
