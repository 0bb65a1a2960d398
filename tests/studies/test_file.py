"""Study files: what is read, defaults, and errors that name the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from microscale.errors import StudyError
from microscale.studies.file import load_study

GOOD = """\
models: [m]
formats: [mxfp4]
tasks: [{task: piqa}]
"""


def test_defaults_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "models: [dir/m]\nformats: [mxfp4, {weights: mxfp4, activations: mxfp8}, {weights: nvfp4, activations: none}]\n"
        "tasks: [{text: dir/book.txt}, {task: piqa, name: p}]\n"
    )
    study = load_study(path)
    assert [model.label for model in study.models] == ["m"] and [m.label for m in study.methods] == ["rtn"]
    assert [study.format_label(one) for one in study.formats] == ["mxfp4", "mxfp4 / mxfp8", "nvfp4 / none"]
    assert [str(study.activations_of(one)) for one in study.formats] == ["mxfp4", "mxfp8", "None"]
    assert [task.label for task in study.tasks] == ["book", "p"]
    assert study.place("dir/m") == "dir/m"
    (tmp_path / "dir" / "m").mkdir(parents=True)
    assert study.place("dir/m") == str(tmp_path / "dir" / "m")


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (("mxfp4", "mxfp5"), 2, "mxfp5"),
        (("mxfp4", "{weights: mxfp4, activations: x}"), 2, "'x'"),
        (("[mxfp4]", "[]"), 1, "formats: at least one"),
        (("[mxfp4]", "[mxfp4, mxfp4]"), 1, "stands there twice"),
        (("task: piqa", "tusk: piqa"), 3, "tusk"),
        (("task: piqa", "task: piqa, text: t"), 3, "either 'text'"),
        (("task: piqa", "limit: 3"), 3, "either 'text'"),
        (("tasks", "models"), 3, "twice"),
        (
            ("models", "model"),
            1,
            "unknown key 'model'; did you mean models? known keys: models, formats, methods, tasks",
        ),
        (("tasks", "taskss"), 3, "unknown key 'taskss'; did you mean tasks?"),
        (
            ("task: piqa", "task: piqa, limitt: 3"),
            3,
            "unknown key 'tasks.0.limitt'; did you mean limit? known keys: text",
        ),
        (
            ("tasks", "methods: [{methd: gptq}]\ntasks"),
            3,
            "did you mean method? known keys: method, name, effort, formats",
        ),
        (("tasks", "folder: x\ntasks"), 3, "unknown key 'folder'; known keys: models"),
        (("[m]", "[m"), None, "not valid YAML"),
        ((GOOD, "- 1\n"), 1, "mapping"),
        (("tasks", "methods: [{method: gptq, formats: [x]}]\ntasks"), 1, "none of"),
    ],
)
def test_a_wrong_file(change: tuple[str, str], line: int | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(StudyError) as caught:
        load_study(path)
    message = str(caught.value)
    assert words in message and str(path) in message
    if line is not None:
        assert f"line {line}:" in message


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cannot be read"):
        load_study(tmp_path / "absent.yaml")
