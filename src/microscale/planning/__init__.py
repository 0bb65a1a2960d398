"""Questions about a model or a file."""

from microscale.planning.bench import BenchResult, Speed, measure_speed, resident_bytes
from microscale.planning.comparison import MODES, ComparisonResult, Step, compare_formats
from microscale.planning.inspection import Inspection, LayerFacts, inspect_checkpoint
from microscale.planning.study import (
    PreparedModel,
    StudyExecutor,
    StudyRun,
    StudyStep,
    run_study,
    select_runs,
    study_runs,
)
from microscale.planning.study_results import StudyRow, TaskCell, pareto_front, study_rows
from microscale.planning.study_store import RunState, StoredRun, StudyScore, StudyStore

__all__ = [
    "MODES",
    "BenchResult",
    "ComparisonResult",
    "Inspection",
    "LayerFacts",
    "PreparedModel",
    "RunState",
    "Speed",
    "Step",
    "StoredRun",
    "StudyExecutor",
    "StudyRow",
    "StudyRun",
    "StudyScore",
    "StudyStep",
    "StudyStore",
    "TaskCell",
    "compare_formats",
    "inspect_checkpoint",
    "measure_speed",
    "pareto_front",
    "resident_bytes",
    "run_study",
    "select_runs",
    "study_rows",
    "study_runs",
]
