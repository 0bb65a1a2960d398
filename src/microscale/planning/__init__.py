"""Questions about a model or a file."""

from microscale.planning.bench import BenchResult, Speed, measure_speed, resident_bytes
from microscale.planning.comparison import MODES, ComparisonResult, Step, compare_formats
from microscale.planning.inspection import Inspection, LayerFacts, inspect_checkpoint

__all__ = [
    "MODES",
    "BenchResult",
    "ComparisonResult",
    "Inspection",
    "LayerFacts",
    "Speed",
    "Step",
    "compare_formats",
    "inspect_checkpoint",
    "measure_speed",
    "resident_bytes",
]
