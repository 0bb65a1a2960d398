"""The files beside the weights: all are copied, and nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import microscale
from microscale.integrations.beside import copy_beside, files_beside, source_directory
from tiny_models import save_tiny, tiny_model

FILES = {
    "preprocessor_config.json": '{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}}',
    "chat_template.jinja": "{{ messages }}",
    "modeling_own.py": "x = 1\n",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    "LICENSE": "free",
    "voices.tsv": "a\tb",
}


def with_files(directory: Path) -> Path:
    for name, text in FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    (directory / "pytorch_model.bin").write_bytes(b"weights")
    (directory / "README.md").write_text("the source")
    (directory / ".git").mkdir()
    (directory / ".git" / "config").write_text("hidden")
    return directory


@pytest.mark.parametrize("is_job", [False, True])
def test_all_files_beside_the_weights_are_copied(is_job: bool, tmp_path: Path) -> None:
    source = with_files(save_tiny("llava", tmp_path / "source"))
    (source / "secret.txt").symlink_to("/etc/hostname")
    if is_job:
        microscale.quantize(source, "mxfp4", output=tmp_path / "out")
    else:
        microscale.save(microscale.quantize(source, "mxfp4"), tmp_path / "out")
    out = tmp_path / "out"
    assert {name: (out / name).read_text() for name in FILES} == FILES
    for absent in ("pytorch_model.bin", ".git", "secret.txt"):
        assert not (out / absent).exists()
    processor: Any = transformers.AutoImageProcessor
    assert processor.from_pretrained(out).to_dict() == processor.from_pretrained(source).to_dict()


def test_a_file_that_is_there_already_stays(tmp_path: Path) -> None:
    source, target = with_files(save_tiny("llama", tmp_path / "source")), tmp_path / "target"
    target.mkdir()
    (target / "LICENSE").write_text("other")
    copied = copy_beside(source, target)
    assert (target / "LICENSE").read_text() == "other" and "LICENSE" not in copied
    assert {path.as_posix() for path in files_beside(source)} >= set(FILES)


def test_the_source_of_a_model_must_be_of_its_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert source_directory(model) is None
    model.config._name_or_path = model.name_or_path = str(save_tiny("qwen3", tmp_path / "other"))
    assert source_directory(model) is None
    model.name_or_path = str(save_tiny("llama", tmp_path / "same"))
    assert source_directory(model) == tmp_path / "same"
