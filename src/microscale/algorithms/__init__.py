"""Methods: one file for each published one, pure functions; chains of them by name or by words."""

from __future__ import annotations

from microscale.algorithms.contract import (
    BlockProblem,
    BlockStep,
    FoldStep,
    FormatStep,
    GroupTask,
    LayerFunction,
    LayerTask,
    ModelProblem,
    ModelStep,
    Progress,
    RotationProblem,
    RotationStep,
    RoundStep,
    SegmentStep,
    SideStep,
    Step,
    TransformStep,
)
from microscale.algorithms.pipeline import EFFORTS, METHODS, STEPS, Pipeline, parse_method, step_text

__all__ = [
    "EFFORTS",
    "METHODS",
    "STEPS",
    "BlockProblem",
    "BlockStep",
    "FoldStep",
    "FormatStep",
    "GroupTask",
    "LayerFunction",
    "LayerTask",
    "ModelProblem",
    "ModelStep",
    "Pipeline",
    "Progress",
    "RotationProblem",
    "RotationStep",
    "RoundStep",
    "SegmentStep",
    "SideStep",
    "Step",
    "TransformStep",
    "parse_method",
    "step_text",
]
