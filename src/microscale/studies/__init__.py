"""Studies: models × formats × methods × tasks, from a file to results that can be resumed and compared.

The room is not called `study`, for ``microscale.study`` is the job.
"""

from microscale.studies.file import Study, StudyFormat, StudyMethod, StudyModel, StudyTask, load_study
from microscale.studies.results import StudyRow, TaskCell, pareto_front, study_rows
from microscale.studies.run import PreparedModel, StudyExecutor, StudyRun, StudyStep, run_study, select_runs, study_runs
from microscale.studies.store import RunState, StoredRun, StudyScore, StudyStore

__all__ = [
    "PreparedModel",
    "RunState",
    "StoredRun",
    "Study",
    "StudyExecutor",
    "StudyFormat",
    "StudyMethod",
    "StudyModel",
    "StudyRow",
    "StudyRun",
    "StudyScore",
    "StudyStep",
    "StudyStore",
    "StudyTask",
    "TaskCell",
    "load_study",
    "pareto_front",
    "run_study",
    "select_runs",
    "study_rows",
    "study_runs",
]
