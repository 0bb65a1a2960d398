"""Scores of a callable model. Knows no format."""

from microscale.evaluation.fidelity import FidelityResult, divergence, fidelity
from microscale.evaluation.layer_error import LayerError, decoder_layers, layer_errors
from microscale.evaluation.perplexity import (
    DEFAULT_BATCH,
    DEFAULT_WINDOW,
    LanguageModel,
    PerplexityResult,
    make_windows,
    perplexity,
)
from microscale.evaluation.tasks import GROUPS, TASKS, TaskRecord, TaskScore, find_task

__all__ = [
    "DEFAULT_BATCH",
    "DEFAULT_WINDOW",
    "GROUPS",
    "TASKS",
    "FidelityResult",
    "LanguageModel",
    "LayerError",
    "PerplexityResult",
    "TaskRecord",
    "TaskScore",
    "decoder_layers",
    "divergence",
    "fidelity",
    "find_task",
    "layer_errors",
    "make_windows",
    "perplexity",
]
