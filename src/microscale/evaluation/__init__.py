"""Scores of a callable model. Knows no format."""

from microscale.evaluation.fidelity import fidelity
from microscale.evaluation.perplexity import make_windows, perplexity

__all__ = ["fidelity", "make_windows", "perplexity"]
