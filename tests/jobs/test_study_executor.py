"""The executor of studies: what it loads, quantizes and scores is what the single jobs do."""

from __future__ import annotations

from pathlib import Path

import pytest

import microscale
from microscale.errors import ShapeError
from microscale.jobs.study_executor import QuantizeAndScore
from microscale.nn.packed import PackedModule
from microscale.studies.file import Study, load_study
from microscale.studies.run import StudyRun, study_runs
from small_models import save_random_model

FILE = """\
models: [tiny]
formats: [{name: w4, weights: mxfp4, activations: mxfp8}]
methods: [rtn, gptq, {name: learned, method: best, effort: fast}]
calibration: {text: book.txt, samples: 3, window: 24}
effort: good
seed: 7
tasks:
  - {text: book.txt, window: 32, tokens: 64}
  - {text: book.txt, window: 4096, name: long}
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("executor")
    save_random_model(root / "tiny")
    (root / "book.txt").write_text("The harbour was quiet. " * 20)
    (root / "study.yaml").write_text(FILE)
    return load_study(root / "study.yaml")


def run_of(study: Study, method: str | None) -> StudyRun:
    found = [run for run in study_runs(study) if (None if run.method is None else run.method.label) == method]
    return found[0]


def test_the_unquantized_model_has_all_bits_of_its_type(study: Study) -> None:
    prepared = QuantizeAndScore(study).prepare(run_of(study, None))
    assert prepared.bits_per_weight == 16.0 and prepared.notes == ()
    assert not any(isinstance(module, PackedModule) for module in prepared.model.modules())


def test_a_run_scores_as_the_single_jobs_do(study: Study) -> None:
    executor, run = QuantizeAndScore(study), run_of(study, "rtn")
    prepared = executor.prepare(run)
    assert prepared.bits_per_weight == 4.25
    (score,) = executor.score(prepared, run, study.tasks[0])
    source = study.place("tiny")
    model = microscale.quantize(microscale.load(source, dtype=prepared.model.dtype), "mxfp4", activations="mxfp8")
    found = microscale.evaluate(
        model,
        tokenizer=microscale.load_tokenizer(source),
        text=str(study.place("book.txt")),
        window=32,
        tokens=64,
    )
    assert found.on_text is not None and score.value == found.on_text.score.perplexity
    assert (score.metric, score.samples, score.is_higher_better) == ("perplexity", found.on_text.score.tokens, False)


def test_a_window_longer_than_the_model_is_refused(study: Study) -> None:
    executor, run = QuantizeAndScore(study), run_of(study, None)
    with pytest.raises(ShapeError, match="window 4096 is longer"):
        executor.score(executor.prepare(run), run, study.tasks[1])


def test_words_of_a_recipe_and_of_its_calibration(study: Study) -> None:
    """A method's own effort wins over that of the study; a method without efforts has none."""
    executor = QuantizeAndScore(study)
    efforts = {}
    for name in ("rtn", "gptq", "learned"):
        run = run_of(study, name)
        assert run.method is not None
        recipe = executor.recipe(run, run.method)
        efforts[name] = recipe.effort
        assert str(recipe.format) == "mxfp4" and str(recipe.activations) == "mxfp8"
    assert efforts == {"rtn": None, "gptq": None, "learned": "fast"}
    text = executor.calibration()
    assert (Path(str(text.source)).name, text.samples, text.window, text.seed) == ("book.txt", 3, 24, 7)


def test_the_machine_is_named_with_its_threads(study: Study) -> None:
    assert QuantizeAndScore(study).machine.endswith("threads")
