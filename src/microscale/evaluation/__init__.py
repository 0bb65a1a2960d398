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

__all__ = [
    "DEFAULT_BATCH",
    "DEFAULT_WINDOW",
    "FidelityResult",
    "LanguageModel",
    "LayerError",
    "PerplexityResult",
    "decoder_layers",
    "divergence",
    "fidelity",
    "layer_errors",
    "make_windows",
    "perplexity",
]
