"""The steps from a model to a quantized one: their stages, and what is left for the caller."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import microscale
from microscale.algorithms import parse_method, read_method, with_budget
from microscale.algorithms.micromix import MicroMix
from microscale.errors import CalibrationError, MicroscaleError, ModelError, RecipeError, ShapeError, TextError
from microscale.integrations import quantization
from microscale.integrations.allocating import AutoRecipe
from microscale.integrations.quantization import (
    CalibrationOptions,
    choose_recipe,
    quantize_original,
    report_quantizing,
)
from microscale.nn import PackedModule
from microscale.recipes import ignore_progress, make_recipe
from small_models import TOKENS, save_random_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


def test_each_stage_is_entered_once_and_left_before_the_next(source: Path) -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def stages(title: str) -> Iterator[Callable[[int, int, str], None]]:
        seen.append(f"start {title}")
        yield lambda done, total, name: seen.append(title) if done == total else None
        seen.append(f"end {title}")

    recipe = make_recipe(format="nvfp4", activations="nvfp4@static")
    done = quantize_original(source, recipe, CalibrationOptions(source=TOKENS), version="1", stages=stages)
    titles = ("quantizing", "measuring ranges")
    assert seen == [text for title in titles for text in (f"start {title}", title, f"end {title}")]
    assert done.ranges is not None and len(done.ranges.ranges) == 14 and done.ranges.unseen == ()


def test_without_calibration_no_range_is_measured_and_nothing_is_stored(source: Path) -> None:
    recipe, silent = make_recipe(format="nvfp4", activations="nvfp4@static"), report_quantizing(ignore_progress)
    done = quantize_original(source, recipe, CalibrationOptions(), version="1", stages=silent)
    assert done.ranges is None and done.store is None


def test_a_job_stays_on_disk_until_the_caller_clears_it(source: Path, tmp_path: Path) -> None:
    recipe, silent = make_recipe(format="mxfp4", method="gptq"), report_quantizing(ignore_progress)
    options = CalibrationOptions(source=TOKENS)
    done = quantize_original(source, recipe, options, version="1", stages=silent, offload=tmp_path / "job")
    assert done.store is not None and done.store.path is not None and any(done.store.path.iterdir())
    done.store.clear()
    assert not done.store.path.exists()
    assert any(isinstance(module, PackedModule) for module in done.model.modules())
    assert done.model.config.microscale["version"] == "1"


def never(*args: Any, **kwargs: Any) -> Any:
    """Stands for reading weights or text, which must not happen."""
    raise AssertionError("weights or text were read before the job was refused")


REFUSED: list[tuple[dict[str, Any], type[MicroscaleError], str]] = [
    ({"format": "mxfp4:stochastic(1)", "method": "gptq"}, RecipeError, "step gptq cannot quantize to"),
    ({"format": "mxfp4", "method": "gptq", "rules": ["*.down_proj=mxfp4:stochastic(1)"]}, RecipeError, "down_proj"),
    ({"format": "adaptive_2_4", "method": "autoround"}, RecipeError, "step autoround cannot quantize to"),
    ({"format": "mxfp4", "method": "quarot", "offload": "job"}, CalibrationError, "quarot works on the whole model"),
    ({"format": "mxfp4", "method": "qad", "offload": "job"}, CalibrationError, "distill works on the whole model"),
    ({"format": "mxfp4", "method": "gptq", "calibration": None}, CalibrationError, "needs calibration text"),
    ({"format": "mxfp4", "exclude": ["nothing*"]}, RecipeError, "matches no layer"),
    ({"format": "mxfp4", "feed": "both"}, CalibrationError, "unknown feed 'both'"),
    ({"format": "mxfp4", "offload": 5}, CalibrationError, "offload is a directory .* got int 5"),
    (
        {"format": "mxfp4,mxfp8", "method": "auto", "bits": 5.0, "offload": 5},
        CalibrationError,
        "offload is a directory",
    ),
    ({"format": "mxfp4,mxfp8", "method": "auto", "bits": 5.0, "feed": "both"}, CalibrationError, "unknown feed"),
    ({"format": "mxfp4", "method": "gptq", "window": 99999}, ShapeError, "window 99999 is longer than"),
    ({"format": "nvfp4", "activations": "nvfp4@static", "observer": "nope"}, CalibrationError, "unknown observer"),
    ({"format": "nvfp4", "activations": "nvfp4@static", "observer": "kl"}, CalibrationError, "use mse"),
    ({"format": "nvfp4", "activations": "nvfp4", "observer": "mse"}, CalibrationError, "write the .* with @static"),
    (
        {"format": "nvfp4", "activations": "nvfp4@static", "observer": "mse", "calibration": None},
        CalibrationError,
        "observer mse measures ranges on calibration text",
    ),
]


@pytest.mark.parametrize(("options", "kind", "words"), REFUSED)
def test_what_cannot_work_is_refused_before_text_and_weights_are_read(
    source: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], kind: type[MicroscaleError], words: str
) -> None:
    for name in ("load_original", "read_windows", "LayerFile"):
        monkeypatch.setattr(quantization, name, never)
    given = {"calibration": "absent.txt", **options}
    with pytest.raises(kind, match=words):
        microscale.quantize(source, **given)


def test_a_model_in_memory_is_refused_as_it_is(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from microscale.integrations.loading import load_original

    model = load_original(source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(quantization, "read_windows", never)
    with pytest.raises(RecipeError, match="step gptq"):
        microscale.quantize(model, "mxfp4:stochastic(1)", method="gptq", calibration="absent.txt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_outline_that_cannot_be_built_is_no_obstacle(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "outline_model", lambda path: None)
    with pytest.raises(RecipeError, match="step gptq"):
        microscale.quantize(source, "mxfp4:stochastic(1)", method="gptq", calibration=TOKENS)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, "got int 5"),
        ([1, 2], "got list of int"),
        (["text", 3], "got list of str, int"),
        ([], r"got list \[\]"),
        (np.zeros((2, 8), dtype=np.float32), "got ndarray"),
        (b"text", "got bytes"),
    ],
)
def test_what_is_no_calibration_is_said(source: Path, given: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=f"calibration is a text file.*{words}"):
        microscale.quantize(source, "mxfp4", method="gptq", calibration=given)


def test_token_ids_may_be_a_numpy_array(source: Path) -> None:
    parts = [
        microscale.quantize(source, "mxfp4", method="gptq", calibration=tokens).state_dict()
        for tokens in (TOKENS, TOKENS.numpy().astype(np.int32))
    ]
    assert all(torch.equal(tensor, parts[1][name]) for name, tensor in parts[0].items())


def test_texts_in_a_list_are_those_of_json_lines(source: Path, tmp_path: Path) -> None:
    texts = ["The harbour was quiet. " * 9, "  ", "A ship came in, and then another one. " * 9]
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options: dict[str, Any] = {"method": "gptq", "samples": 3, "window": 32}
    made = [microscale.quantize(source, "mxfp4", calibration=given, **options).state_dict() for given in (texts, lines)]
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
    with pytest.raises(TextError, match="blank"):
        microscale.quantize(source, "mxfp4", calibration=[" ", "\n"], **options)


def test_texts_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    bare = save_random_model(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="needs a tokenizer"):
        microscale.quantize(bare, "mxfp4", method="gptq", calibration=["some text"])


@pytest.mark.parametrize("bits", ["4.5bits", True, 0.0, -1, math.inf, math.nan])
def test_a_budget_is_a_positive_number(bits: Any) -> None:
    with pytest.raises(RecipeError, match="bits is a number above 0"):
        choose_recipe("mxfp4", bits, method="auto")


def test_rules_of_auto_have_the_inputs_that_are_asked_for() -> None:
    found = choose_recipe(["mxfp4", "nvfp4"], 4.5, method="auto", activations="none", rules=["mlp.down=nvfp4"])
    assert isinstance(found, AutoRecipe)
    assert {one.activations for one in found.options.candidates} == {None}
    assert [one.activations for _, one in found.options.fixed] == [None]
    named = choose_recipe(["mxfp4/mxfp4", "nvfp4"], 4.5, method="auto", activations="none")
    assert isinstance(named, AutoRecipe)
    assert [str(one.activations) for one in named.options.candidates] == ["mxfp4", "None"]


@pytest.mark.parametrize("method", ["auto:bits=4.5", "rtn+auto"])
def test_auto_is_no_step(method: str) -> None:
    with pytest.raises(RecipeError, match="auto is no step of a chain"):
        choose_recipe(None, 4.5, method=method)


@pytest.mark.parametrize("bits", [1e9, 4.8765432])
def test_a_budget_is_kept_to_the_last_digit(bits: float) -> None:
    steps = parse_method(with_budget(read_method("micromix"), bits).text).of_kind(MicroMix)
    assert [float(step.bits) for step in steps] == [bits]
