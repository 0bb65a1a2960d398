"""What the tests of planning measure: a table of a tiny model's layers in three formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from microscale.calibration.cache import ActivationStore
from microscale.planning.allocated_layers import allocated_layers
from microscale.planning.analysis import ModelAnalysis, analyze_model
from microscale.planning.candidates import Candidate, parse_candidates
from microscale.planning.layer_table import measure_table
from microscale.planning.sensitivity import Sensitivity
from microscale.recipes.calibration import Calibration, Feed

WINDOWS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))


CALIBRATION = Calibration(windows=WINDOWS, feed=Feed.ORIGINAL)


FORMATS = parse_candidates("mxfp4,nvfp4,mxfp6_e2m3")


def table_of(
    model: Any,
    kind: Sensitivity = Sensitivity.FISHER,
    method: str = "rtn",
    effort: str = "fast",
    candidates: Sequence[Candidate] = FORMATS,
    **options: Any,
) -> Any:
    layers, every = allocated_layers(model, candidates, **options)
    table = measure_table(
        model,
        layers,
        every,
        calibration=CALIBRATION,
        method_text=CALIBRATION,
        sensitivity=kind,
        method=method,
        effort=effort,
        latency_tokens=None,
        progress=lambda done, total, label: None,
    )
    return layers, table


TEXT_WINDOWS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(3))
ANALYZED_FORMATS = parse_candidates("mxfp4,mxfp6_e2m3,mxfp8/none")


def analyze(model: Any, gradients: ActivationStore | None = None, source: Any = None) -> ModelAnalysis:
    calibration = Calibration(windows=TEXT_WINDOWS, feed=Feed.ORIGINAL)
    return analyze_model(
        model,
        ANALYZED_FORMATS,
        calibration,
        source=source,
        gradients=gradients,
        progress=lambda done, total, label: None,
    )
