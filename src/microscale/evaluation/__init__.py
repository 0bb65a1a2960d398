"""Scores of a callable model. Knows no format."""

from microscale.evaluation.perplexity import (
    DEFAULT_BATCH,
    DEFAULT_WINDOW,
    LanguageModel,
    PerplexityResult,
    make_windows,
    perplexity,
)

__all__ = ["DEFAULT_BATCH", "DEFAULT_WINDOW", "LanguageModel", "PerplexityResult", "make_windows", "perplexity"]
