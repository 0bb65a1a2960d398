"""Loading: hub names, other kinds of files, warnings, and silence."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers

import microscale
from microscale.errors import ArgumentError, CheckpointNotFoundError, ModelError, ShapeError
from microscale.integrations import hub
from microscale.integrations.hub import check_local
from microscale.integrations.loading import check_window, stored_dtype
from microscale.nn.embedding import NarrowEmbedding
from small_models import edit_config, logits, read_config, same_bits, save_random_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


def test_an_unquantized_model_is_what_transformers_loads(source: Path) -> None:
    expected = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert same_bits(logits(microscale.load(source)), logits(expected))


def test_older_weight_files_load_too(source: Path, tmp_path: Path) -> None:
    """pytorch_model.bin is read through transformers, and can be quantized."""
    model = microscale.load(source)
    shutil.copytree(source, tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    assert same_bits(logits(microscale.load(tmp_path / "old")), logits(model))
    assert same_bits(
        logits(microscale.quantize(tmp_path / "old", "mxfp4")), logits(microscale.quantize(source, "mxfp4"))
    )


def test_what_may_be_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network a hub name cannot be found; the message says what was tried."""
    monkeypatch.chdir(tmp_path)
    for name in ("nobody/no-such-model", "no-such-model"):
        with pytest.raises(CheckpointNotFoundError, match=name):
            microscale.load(name)
    for path in ("", "a/b/c", "./a", "~/a", "/a"):
        with pytest.raises(CheckpointNotFoundError, match="not a model directory"):
            check_local(path)
        with pytest.raises(CheckpointNotFoundError if path else ArgumentError):
            microscale.load_tokenizer(path)


def test_loading_is_quiet(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = microscale.load_tokenizer(source)
    microscale.save(microscale.quantize(source, "mxfp4_plus"), tmp_path / "out", tokenizer=tokenizer)
    microscale.save(microscale.quantize(source, "mxfp4"), tmp_path / "theirs", tokenizer=tokenizer)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (source, tmp_path / "out", tmp_path / "theirs"):
            microscale.load(path)
            microscale.load_tokenizer(path)
    output = capfd.readouterr()
    assert output.out == "" and output.err == "" and caplog.text == ""


def test_loading_leaves_the_settings_of_transformers_alone(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "check_hub_name", lambda name: None)
    settings = transformers.utils.logging
    before = (settings.get_verbosity(), settings.is_progress_bar_enabled())
    for verbosity in (logging.INFO, logging.ERROR):
        settings.set_verbosity(verbosity)
        microscale.load(source)
        with pytest.raises(ModelError):
            microscale.load("nobody/no-such-model")
        assert settings.get_verbosity() == verbosity
    settings.set_verbosity(before[0])
    assert settings.is_progress_bar_enabled() == before[1]


def test_weights_that_the_config_has_no_place_for_are_told(source: Path, tmp_path: Path) -> None:
    """A config with fewer layers than the file would silently be a smaller model."""
    shutil.copytree(source, tmp_path / "copy")
    edit_config(tmp_path / "copy", num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"model\.layers\.1\."):
        microscale.load(tmp_path / "copy")


def test_the_dtype_of_a_checkpoint(source: Path) -> None:
    assert stored_dtype(source) == torch.bfloat16
    with pytest.raises(ModelError, match="no config"):
        stored_dtype(source / "absent")


def test_windows_longer_than_the_model(source: Path) -> None:
    model = microscale.load(source)
    check_window(model, 128)
    with pytest.raises(ShapeError, match="longer than the 128 positions"):
        check_window(model, 129)


@pytest.mark.parametrize("layout", ["microscale", "compressed-tensors"])
def test_an_embedding_keeps_the_dtype_of_its_file(source: Path, tmp_path: Path, layout: str) -> None:
    """Looked up and cast, it gives the numbers of a table cast as a whole; a second saving writes the same values."""
    microscale.save(microscale.quantize(source, "mxfp4"), tmp_path / "out", layout=layout)
    model = microscale.load(tmp_path / "out", dtype=torch.float32)
    table = model.get_input_embeddings()
    assert isinstance(table, NarrowEmbedding) and table.weight.dtype == torch.bfloat16
    assert model.dtype == torch.float32 and model.lm_head.weight.dtype == torch.float32
    expected = microscale.load(tmp_path / "out").to(torch.float32)
    assert same_bits(logits(model), logits(expected)) and logits(model).dtype == torch.float32
    microscale.save(model, tmp_path / "again", layout="microscale")
    assert "narrow_tables" not in (tmp_path / "again" / "config.json").read_text("utf-8")
    again = microscale.load(tmp_path / "again", dtype=torch.float32)
    assert same_bits(logits(again), logits(expected))
    model.save_pretrained(tmp_path / "direct")
    assert "narrow_tables" not in (tmp_path / "direct" / "config.json").read_text("utf-8")


def test_a_tied_embedding_is_as_wide_as_the_model(tmp_path: Path) -> None:
    tied = save_random_model(tmp_path / "tied", tie_word_embeddings=True)
    microscale.save(microscale.quantize(tied, "mxfp4"), tmp_path / "out", layout="microscale")
    model = microscale.load(tmp_path / "out", dtype=torch.float32)
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_narrow_tables_of_a_hostile_config_count_for_nothing(source: Path, tmp_path: Path) -> None:
    microscale.save(microscale.quantize(source, "mxfp4"), tmp_path / "out", layout="microscale")
    config = read_config(tmp_path / "out")["quantization_config"]
    for value in ({"model.embed_tokens": "float8"}, ["x"], 3):
        edit_config(tmp_path / "out", quantization_config={**config, "narrow_tables": value})
        assert isinstance(microscale.load(tmp_path / "out").get_input_embeddings(), torch.nn.Embedding)
