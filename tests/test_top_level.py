"""`import microscale`: the functions of a user, and what they promise."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from microscale import errors
from microscale.nn.packed import PackedModule
from small_models import LLAMA_6M, logits, read_config, same_bits, save_random_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


def test_everything_that_is_promised_is_there() -> None:
    for name in microscale.__all__:
        assert getattr(microscale, name) is not None
    for function in (microscale.quantize, microscale.load, microscale.save, microscale.load_tokenizer):
        assert "Raises:" in (inspect.getdoc(function) or "")
    assert microscale.__version__.count(".") == 2


def test_tensors() -> None:
    values = torch.tensor([[1.0, 2.5, -0.3, 6.0]])
    packed = microscale.quantize_tensor(values, "mxfp4")
    assert isinstance(packed, microscale.QuantizedTensor)
    assert microscale.dequantize_tensor(packed).tolist() == [[1.0, 2.0, -0.5, 6.0]]
    assert microscale.fake_quantize(values, "mxfp4").tolist() == [[1.0, 2.0, -0.5, 6.0]]
    assert microscale.format_name(microscale.parse_format("e2m1/32:e8m0:floor")) == "mxfp4"
    assert packed.format == microscale.NAMED_FORMATS["mxfp4"].format


def test_a_model_in_memory_or_by_path(source: Path) -> None:
    """A model is changed in place and returned; a path loads it first."""
    model = microscale.load(source)
    assert microscale.quantize(model, "mxfp4") is model
    assert any(isinstance(module, PackedModule) for module in model.modules())
    for place in (source, str(source)):
        assert same_bits(logits(microscale.quantize(place, "mxfp4")), logits(model))


def test_a_quantized_model_in_memory_can_be_saved_by_transformers(source: Path, tmp_path: Path) -> None:
    model = microscale.quantize(source, "mxfp4", activations="mxfp8")
    model.save_pretrained(tmp_path / "theirs")
    microscale.save(model, tmp_path / "ours", layout="microscale")
    for place in ("theirs", "ours"):
        assert same_bits(logits(microscale.load(tmp_path / place)), logits(model))
    assert read_config(tmp_path / "theirs") == read_config(tmp_path / "ours")


def test_what_runs_otherwise_than_asked_is_said(source: Path) -> None:
    """The notes of the command line are warnings here; a job that runs as asked has none."""
    with pytest.warns(errors.QuantizationNote, match="activations mxfp8 are executed as .*compressed-tensors"):
        microscale.quantize(source, "mxfp4", activations="mxfp8", layout="auto")
    with pytest.warns(errors.QuantizationNote, match="simulated"):
        microscale.quantize(source, "mxfp4", attention="mxfp8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.QuantizationNote)
        microscale.quantize(source, "mxfp4", activations="mxfp8")


def test_progress(source: Path) -> None:
    seen: list[tuple[int, int]] = []
    microscale.quantize(source, "mxfp4", progress=lambda done, total, name: seen.append((done, total)))
    assert seen == [(done, 14) for done in range(15)]


def test_load_and_its_dtype(source: Path) -> None:
    assert microscale.load(source).dtype == torch.bfloat16
    assert microscale.load(str(source), dtype=torch.float32).dtype == torch.float32
    assert not microscale.load(source).training
    assert microscale.load_tokenizer(LLAMA_6M)("The sea")["input_ids"]


def test_save_says_which_layout_it_wrote(source: Path, tmp_path: Path) -> None:
    model = microscale.quantize(source, "mxfp4")
    assert microscale.save(model, tmp_path / "a") == "compressed-tensors"
    assert microscale.save(model, str(tmp_path / "b"), layout="microscale") == "microscale"
    assert microscale.save(model, tmp_path / "a", layout="quark", overwrite=True) == "quark"
    with pytest.raises(errors.LayoutError, match="unknown layout 'gguf'"):
        microscale.save(model, tmp_path / "c", layout="gguf")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]


def test_a_model_is_the_same_after_it_was_saved(source: Path, tmp_path: Path) -> None:
    model = microscale.quantize(source, "mxfp4", activations="mxfp8", layout="auto")
    before, config = logits(model), model.config.to_dict()
    for layout in ("auto", "microscale"):
        microscale.save(model, tmp_path / layout, layout=layout)
    assert same_bits(logits(model), before)
    assert model.config.to_dict() == config


def test_every_error_is_a_microscale_error() -> None:
    classes = [value for value in vars(errors).values() if inspect.isclass(value) and not issubclass(value, Warning)]
    assert all(issubclass(value, errors.MicroscaleError) for value in classes) and len(classes) > 12
    assert issubclass(errors.CheckpointNotFoundError, FileNotFoundError)
    assert issubclass(errors.CheckpointWriteError, OSError)
    for value in (errors.FormatError, errors.RecipeError, errors.LayoutError, errors.TextError, errors.ShapeError):
        assert issubclass(value, ValueError)
    error = errors.DependencyError("jinja2", "report", "The page")
    words = "The page needs jinja2, which is not installed; run: pip install jinja2 (part of microscale[report])"
    assert str(error) == words


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"exclude": "lm_head"}, "exclude is a list of texts"),
        ({"rules": 3}, "rules is a list of texts"),
        ({"samples": "8"}, "samples is a whole number from 1 on, got '8'"),
        ({"window": 1}, "window is a whole number from 2 on, got 1"),
        ({"seed": -1}, "seed is a whole number from 0 on, got -1"),
    ],
)
def test_words_of_a_wrong_kind(source: Path, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(errors.MicroscaleError, match=problem):
        microscale.quantize(source, "mxfp4", **options)


@pytest.mark.parametrize("model", [5, torch.nn.Linear(64, 64), torch.nn.Sequential()])
def test_what_is_no_model(model: Any) -> None:
    with pytest.raises(errors.ModelError, match="a transformers model is quantized"):
        microscale.quantize(model, "mxfp4")


def test_dtypes_may_be_words(source: Path, tmp_path: Path) -> None:
    microscale.save(microscale.quantize(source, "mxfp4"), tmp_path / "out")
    for place in (source, tmp_path / "out"):
        assert microscale.load(place, dtype="float32").dtype == torch.float32  # pyright: ignore[reportArgumentType]
        for wrong in ("float99", "int8", 3):
            with pytest.raises(errors.DtypeError, match="dtype is a float type of torch"):
                microscale.load(place, dtype=wrong)  # pyright: ignore[reportArgumentType]


def test_files_can_be_read_by_others(source: Path, tmp_path: Path) -> None:
    microscale.save(microscale.quantize(source, "mxfp4"), tmp_path / "out")
    (tmp_path / "new").touch()
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {(tmp_path / "new").stat().st_mode} and "model.safetensors" in modes
