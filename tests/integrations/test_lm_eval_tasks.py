"""Tasks through lm-eval: our definitions ask what lm-eval's own ask, scores equal its own class's, every task runs."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from microscale.errors import TaskError
from microscale.evaluation.tasks import TASKS
from microscale.integrations.loading import load_model, load_tokenizer
from small_models import BOS, POSITIONS, save_random_model
from task_data import ROWS, write_jsonl, write_task_data

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models import huggingface  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from microscale.integrations import lm_eval_runner  # noqa: E402
from microscale.integrations.lm_eval_model import EvaluatedModel  # noqa: E402
from microscale.integrations.lm_eval_runner import CodeExecution, TaskRequest, run_tasks  # noqa: E402
from microscale.integrations.task_data import documents, splits_of  # noqa: E402

HFLM: Any = huggingface.HFLM  # its decorator gives the type of any model
OWN = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task_data(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path = save_random_model(tmp_path_factory.mktemp("model") / "model", max_position_embeddings=512)
    return load_model(path, dtype=torch.float32), load_tokenizer(path)


def requests_of(task: Any, shots: int = 0) -> list[tuple[str, tuple[Any, ...]]]:
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=0)
    task.build_all_requests(rank=0, world_size=1)
    return [(instance.request_type, instance.args) for instance in task.instances]


def ours(name: str, folder: Path) -> Any:
    task, _, _ = lm_eval_runner._local_task(name, lm_eval_runner.find_task(name), folder, TaskRequest(tasks=(name,)))
    return task


def its_own(file: str, rows: list[dict[str, Any]], examples: list[dict[str, Any]] | None = None) -> Any:
    """lm-eval's own definition with rows of the hub's form instead of a download."""
    from datasets import Dataset

    config = load_yaml(OWN / file)
    rows_set = Dataset.from_list(rows)
    config["custom_dataset"] = lambda **_: {
        "train": rows_set,
        "validation": rows_set,
        "test": rows_set,
        "dev": Dataset.from_list(examples or rows),
    }
    config.pop("tag", None)
    return ConfigurableTask(config=config)


PAIRS = {
    "lambada": "lambada/lambada_openai.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "siqa": "siqa/siqa.yaml",
}


@pytest.mark.parametrize("name", PAIRS)
def test_our_definition_asks_what_its_own_asks(name: str, folder: Path) -> None:
    mine, other = ours(name, folder), its_own(PAIRS[name], ROWS[name])
    found = requests_of(mine)
    assert found == requests_of(other) and len(found) >= len(ROWS[name])
    if name != "lambada":  # multiple choice: the same scores for the same answers
        for one, two in zip(mine.eval_docs, other.eval_docs, strict=True):
            answers = [(-float(place) * 1.7, False) for place in range(len(mine.doc_to_choice(one)), 0, -1)]
            assert mine.process_results(one, answers) == other.process_results(two, answers)


def test_mmlu_with_examples_asks_what_its_own_asks(folder: Path) -> None:
    found = lm_eval_runner.load_documents("mmlu_knots", folder)
    other = its_own("mmlu/default/_default_template_yaml", found.test, found.fewshot)
    description = "The following are multiple choice questions (with answers) about knots.\n\n"
    other.set_config(key="description", value=description)
    mine = ours("mmlu_knots", folder)
    assert requests_of(mine, 2) == requests_of(other, 2)
    context = mine.instances[0].args[0]
    assert context.startswith(description + "Example 0?\nA. one") and context.count("Answer:") == 3


def test_blimp_and_gsm8k_ask_what_its_own_ask(folder: Path) -> None:
    found = lm_eval_runner.load_documents("blimp_plain", folder)
    assert requests_of(ours("blimp_plain", folder)) == requests_of(its_own("blimp/_template_yaml", found.test))
    found = lm_eval_runner.load_documents("gsm8k", folder)
    mine, other = ours("gsm8k", folder), its_own("gsm8k/gsm8k.yaml", found.test)
    one, two = requests_of(mine), requests_of(other)
    assert [args[0] for _, args in one] == [args[0] for _, args in two]
    for answer in ("It is 11.\n#### 10", "so $10.", "#### 1,0", "nothing", "10"):
        for task in (mine, other):
            for instance in task.instances:
                instance.resps = [answer]
                instance.filtered_resps = {}
            task.apply_filters()
        assert [i.filtered_resps for i in mine.instances] == [i.filtered_resps for i in other.instances]
        document = mine.eval_docs[0]
        for variant, text in mine.instances[0].filtered_resps.items():
            assert mine.process_results(document, [text]) == other.process_results(document, [text]), variant


def test_wikitext_asks_what_its_own_asks(folder: Path) -> None:
    found = lm_eval_runner.load_documents("wikitext", folder)
    mine, other = ours("wikitext", folder), its_own("wikitext/wikitext.yaml", found.test)
    assert requests_of(mine) == requests_of(other)
    assert "sailed-slowly, and" in mine.instances[0].args[0]
    assert mine.process_results(found.test[0], [-3.0]) == other.process_results(found.test[0], [-3.0])


ALL = [*ROWS, "mmlu", "blimp", "wikitext", "text:note.txt", "blimp_plain", "mmlu_old_boats"]


def test_every_task_runs_offline(folder: Path, loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    request = TaskRequest(tasks=tuple(ALL), task_data=folder, limit=2, code_execution=CodeExecution.ALLOWED, batch=4)
    scores = run_tasks(*loaded, request, lambda done, total: seen.append((done, total)))
    assert {score.task for score in scores if score.group is None} == set(ALL)
    for name in ALL:
        mains = [score for score in scores if score.task == name and score.is_main]
        assert len(mains) == 1, name
        (main,) = mains
        assert math.isfinite(main.value) and main.samples >= 1 and str(folder) in main.source
        assert main.is_higher_better == ("perplexity" not in main.metric)
        record = lm_eval_runner.find_task(name)
        assert main.metric == record.metric and main.chance == record.chance
    parts = {score.task for score in scores if score.group == "blimp"}
    assert parts == {"blimp_plain", "blimp_other"}
    whole = next(score for score in scores if score.task == "blimp" and score.is_main)
    assert (whole.samples == 3 and whole.stderr is None) or whole.samples == 3
    assert seen and all(0 < done <= total for done, total in seen)
    printed = capsys.readouterr()
    assert printed.out == "" and "it/s" not in printed.err


def test_git_says_nothing_where_there_is_no_repository(
    folder: Path,
    loaded: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """lm-eval asks git for a commit hash, whose complaint goes past Python's own streams."""
    from lm_eval import evaluator

    monkeypatch.chdir(tmp_path)
    before = evaluator.get_git_commit_hash
    before()
    assert not shutil.which("git") or "not a git repository" in capfd.readouterr().err  # so the test could fail
    run_tasks(*loaded, TaskRequest(tasks=("piqa",), task_data=folder, limit=1))
    assert tuple(capfd.readouterr()) == ("", "")
    assert evaluator.get_git_commit_hash is before


def test_groups_weigh_their_parts_by_documents(folder: Path, loaded: tuple[Any, Any]) -> None:
    scores = run_tasks(*loaded, TaskRequest(tasks=("blimp",), task_data=folder))
    whole = next(score for score in scores if score.is_main)
    parts = {score.task: score for score in scores if score.group == "blimp" and score.metric == "acc"}
    expected = (2 * parts["blimp_plain"].value + parts["blimp_other"].value) / 3
    assert whole.value == pytest.approx(expected)


class WithBos(HFLM):
    """lm-eval's own class with BOS in front of every sequence, and nothing else of ours."""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokens = super().tok_encode(string, add_special_tokens, **kwargs)
        return tokens if add_special_tokens is False else [BOS, *tokens]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_equal_those_of_its_own_class(family: str, folder: Path, tmp_path: Path) -> None:
    path = save_random_model(tmp_path / family, family, dtype=torch.float32)
    model, tokenizer = load_model(path), load_tokenizer(path)
    tasks = [ours(name, folder) for name in ("piqa", "lambada", "mmlu_knots", "arc_easy", "blimp_plain", "winogrande")]
    instances = [instance for task in tasks for instance in (requests_of(task), task.instances)[1]]
    long = dataclasses.replace(instances[0], arguments=("word " * 60, "and the end"))  # longer than the model
    instances = [*instances, long]
    mine = EvaluatedModel(model, tokenizer, batch=3)
    other = WithBos(pretrained=model, tokenizer=tokenizer, batch_size=3)
    found, expected = mine.loglikelihood(instances), other.loglikelihood(instances, disable_tqdm=True)
    assert mine.max_length == POSITIONS
    for one, two in zip(found, expected, strict=True):
        assert one[0] == pytest.approx(two[0], rel=1e-4, abs=1e-4) and one[1] == bool(two[1])


def test_rolling_scores_equal_those_of_its_own_class(folder: Path, tmp_path: Path) -> None:
    path = save_random_model(tmp_path / "model", dtype=torch.float32)
    model, tokenizer = load_model(path), load_tokenizer(path)
    task = ours("text:note.txt", folder)
    requests_of(task)
    long = dataclasses.replace(task.instances[0], arguments=("All work and no play. " * 30,))
    instances = [*task.instances, long]
    found = EvaluatedModel(model, tokenizer, batch=2).loglikelihood_rolling(instances)
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2).loglikelihood_rolling(instances)
    assert found == pytest.approx(expected, rel=1e-5)


def test_definitions_work_in_the_tool_itself(folder: Path) -> None:
    found = documents(task="piqa", task_data=str(folder), version=1.0, config_source="x")
    assert list(found["test"]) == ROWS["piqa"] and list(found["fewshot"]) == ROWS["piqa"]
    with pytest.raises(TaskError, match="task_data"):
        documents(task="piqa")
    config = load_yaml(lm_eval_runner.DEFINITIONS / "piqa.yaml")
    config["metadata"] |= {"task_data": str(folder)}
    assert requests_of(ConfigurableTask(config=config)) == requests_of(ours("piqa", folder))
    shipped = {path.stem for path in lm_eval_runner.DEFINITIONS.glob("*.yaml")}
    assert shipped == {name for name, record in TASKS.items() if record.files} | {"text"}


def test_two_rows_in_one_shape(folder: Path) -> None:
    found = lm_eval_runner.load_documents("gsm8k", folder)
    assert len(splits_of(found)["fewshot"]) == 8


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no task": ({"tasks": ()}, "no task was asked for"),
    "an unknown task": ({"tasks": ("piqas",)}, "unknown task 'piqas'"),
    "code without permission": ({"tasks": ("humaneval",)}, "--allow-code-execution"),
    "a text without folder": ({"tasks": ("text:a.txt",)}, "--task-data"),
    "a limit of none": ({"tasks": ("piqa",), "limit": 0}, "at least 1"),
    "a negative number of examples": ({"tasks": ("piqa",), "num_fewshot": -1}, "at least 0"),
    "too many examples": ({"tasks": ("mmlu_knots",), "num_fewshot": 9}, "9 few-shot examples were asked for"),
    "an absent text": ({"tasks": ("text:absent.txt",)}, "absent.txt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_request(case: str, folder: Path, loaded: tuple[Any, Any]) -> None:
    fields, words = REFUSED[case]
    request = {"task_data": None if case == "a text without folder" else folder, **fields}
    with pytest.raises(TaskError) as caught:
        run_tasks(*loaded, TaskRequest(**request))
    assert words in str(caught.value)


def test_damaged_data_is_our_error(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "piqa.jsonl", [*ROWS["piqa"], {"goal": "x"}])
    with pytest.raises(TaskError, match=r"piqa\.jsonl, line 3"):
        run_tasks(*loaded, TaskRequest(tasks=("piqa",), task_data=tmp_path))


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(TaskError, match="hub"):
        run_tasks(*loaded, TaskRequest(tasks=("piqa",)))
