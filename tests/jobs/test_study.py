"""The job ``study`` in Python: its rows, the front of each model, and what is refused before hours of work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import microscale
from command_line import succeed
from microscale.errors import StudyError, TextError
from microscale.jobs.printing import json_value
from microscale.jobs.recipe_choice import choose_recipe
from microscale.jobs.study import check_study, fronts_of
from microscale.jobs.study_executor import QuantizeAndScore
from microscale.recipes.recipe import make_recipe
from microscale.studies.file import load_study
from microscale.studies.results import StudyRow
from microscale.studies.run import study_runs
from microscale.studies.store import RunState
from small_models import save_random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    save_random_model(root / "tiny")
    (root / "book.txt").write_text("The harbour was quiet. " * 20)
    return root


def write(folder: Path, name: str, **lines: str) -> Path:
    path = folder / f"{name}.yaml"
    said = {"models": "[tiny]", "formats": "[mxfp8]", "tasks": "[{text: book.txt, window: 32}]"} | lines
    path.write_text("".join(f"{key}: {value}\n" for key, value in said.items()))
    return path


def test_python_and_the_command_line_say_the_same_words(folder: Path) -> None:
    path = write(folder, "python")
    seen: list[tuple[int, int, str]] = []
    found = microscale.study(path, progress=lambda *step: seen.append(step))
    assert json_value(found) == succeed("study", path, "--json", "--report-only").json
    assert [sum(row.executed.get("linear", {}).values()) for row in found.rows] == [0, 14 * 5]
    assert [row.state for row in found.rows] == [RunState.DONE, RunState.DONE] and not found.has_failures
    assert found.page == folder / "python.html" and found.page.is_file()
    assert seen[-1][:2] == (4, 4)
    again = microscale.study(str(path), results=folder / "other.sqlite", imports=[str(folder / "python.sqlite")])
    assert again.imported == ((str(folder / "python.sqlite"), 2),)
    assert json_value(again) == json_value(found)


def test_what_a_method_gets(folder: Path) -> None:
    """A method gets the calibration, the effort and the seed of the file; the formats are executed as asked."""
    lines = {
        "methods": "[{method: best, effort: max, name: slow}, best, gptq]",
        "formats": "[{weights: mxfp8, attention: mxfp4, kv_cache: none}]",
        "calibration": "{text: book.txt, samples: 3, window: 16}",
    }
    study = load_study(write(folder, "options", seed="5", effort="good", **lines))
    executor = QuantizeAndScore(study)
    recipes = [choose_recipe(executor.recipe(run, run.method)) for run in study_runs(study) if run.method is not None]
    rounded = {"format": "mxfp8", "activations": "mxfp8", "attention": "mxfp4", "kv_cache": "none", "layout": None}
    asked = [{"method": "best", "effort": "max"}, {"method": "best", "effort": "good"}, {"method": "gptq"}]
    assert recipes == [make_recipe(**rounded, **words) for words in asked]
    found = executor.calibration()
    assert (found.source, found.samples, found.window, found.seed) == (str(folder / "book.txt"), 3, 16, 5)
    assert (found.feed, found.observer) == ("quantized", None)


def row(model: str, bits: float | None, recovery: float | None) -> StudyRow:
    empty: dict[str, Any] = dict.fromkeys(("num_bytes", "quantize_seconds", "peak_bytes", "gap_closure"))
    words = {"format": "f", "method": "m", "message": "", "machine": ""}
    known = {"model": model, "bits_per_weight": bits, "recovery": recovery}
    return StudyRow(state=RunState.DONE, score_seconds=0.0, cells=(), executed={}, **words, **empty, **known)


def test_each_model_has_a_front_of_its_own() -> None:
    rows = [row("a", 4.0, 90.0), row("a", 5.0, 89.0), row("b", 5.0, 80.0), row("a", 8.0, None), row("b", None, 99.0)]
    assert fronts_of(rows) == {0, 2}
    assert fronts_of([]) == set()


@pytest.mark.parametrize(
    ("lines", "error", "problem"),
    [
        ({"tasks": "[{text: absent.txt}]"}, TextError, "absent.txt does not exist"),
        ({"calibration": "{text: none.txt}"}, TextError, "none.txt does not exist"),
        ({"task_data": "nowhere"}, StudyError, "nowhere is no folder"),
        ({"tasks": "[{task: humaneval}]"}, StudyError, "humaneval runs code"),
    ],
)
def test_what_would_fail_in_every_run(
    folder: Path, lines: dict[str, str], error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        check_study(load_study(write(folder, "wrong", **lines)))
