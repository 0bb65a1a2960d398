"""Questions about a model or a file."""

from microscale.planning.comparison import MODES, ComparisonResult, Step, compare_formats
from microscale.planning.inspection import Inspection, LayerFacts, inspect_checkpoint

__all__ = [
    "MODES",
    "ComparisonResult",
    "Inspection",
    "LayerFacts",
    "Step",
    "compare_formats",
    "inspect_checkpoint",
]
