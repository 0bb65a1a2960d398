"""The job `quantize`: its stages, what it refuses before anything is read, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import microscale
from command_line import succeed
from microscale.algorithms.micromix import MicroMix
from microscale.algorithms.pipeline import parse_method, read_method, with_budget
from microscale.errors import (
    CalibrationError,
    CheckpointWriteError,
    MicroscaleError,
    ModelError,
    OptionError,
    RecipeError,
    ShapeError,
    TextError,
)
from microscale.integrations import originals
from microscale.integrations.loading import load_original
from microscale.jobs import quantize as job
from microscale.jobs.option import record_from
from microscale.jobs.printing import json_value
from microscale.jobs.quantize import quantize
from microscale.jobs.quantize_options import QuantizeOptions, RecipeOptions
from microscale.jobs.recipe_choice import AutoRecipe, choose_recipe
from microscale.jobs.reporting import Progress, ProgressReporter
from microscale.nn.packed import PackedModule
from microscale.recipes.forecast import Forecast
from microscale.recipes.recipe import make_recipe
from small_models import TOKENS, read_config, save_random_model


def options_of(source: Path, **words: Any) -> QuantizeOptions:
    return record_from(QuantizeOptions, {"model": source, **words})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


class Listener(ProgressReporter):
    """Notes the beginning and the end of every stage."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    @contextlib.contextmanager
    def stage(self, title: str) -> Generator[Progress]:
        self.seen.append(f"start {title}")
        yield lambda done, total, name: self.seen.append(title) if done == total else None
        self.seen.append(f"end {title}")


STATIC = {"format": "nvfp4", "activations": "nvfp4@static"}


def test_each_stage_is_entered_once_and_left_before_the_next(source: Path) -> None:
    listener = Listener()
    done = quantize(options_of(source, calibration=TOKENS, **STATIC), listener)
    titles = ("quantizing", "measuring ranges")
    assert listener.seen == [text for title in titles for text in (f"start {title}", title, f"end {title}")]
    assert done.ranges is not None and len(done.ranges.ranges) == 14 and done.ranges.unseen == ()


def test_without_calibration_no_range_is_measured_and_none_is_written(source: Path, tmp_path: Path) -> None:
    done = quantize(options_of(source, **STATIC))
    assert done.ranges is None and done.checkpoint is None
    with pytest.raises(RecipeError, match="activations nvfp4@static need text to measure their range on"):
        quantize(options_of(source, output=tmp_path / "out", **STATIC))


def test_a_job_stays_on_disk_until_its_checkpoint_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> str:
        raise CheckpointWriteError("the disk is full")

    words = {"format": "mxfp4", "method": "gptq", "calibration": TOKENS, "offload": tmp_path / "job"}
    options = options_of(source, output=tmp_path / "out", **words)
    with monkeypatch.context() as patched:
        patched.setattr(job, "save_model", full)
        with pytest.raises(CheckpointWriteError, match="the disk is full"):
            quantize(options)
    assert any((tmp_path / "job").rglob("*.*"))
    done = quantize(options)
    assert not any((tmp_path / "job").rglob("*.*"))
    assert any(isinstance(module, PackedModule) for module in done.model.modules())
    assert done.checkpoint is not None and done.checkpoint.output == tmp_path / "out"
    assert done.model.config.microscale["version"] == read_config(tmp_path / "out")["microscale"]["version"]
    assert done.model.config.microscale["version"] == microscale.__version__


def test_python_writes_what_the_command_writes(source: Path, tmp_path: Path) -> None:
    """With an output the layout is chosen as the command chooses it; without, the formats run exactly as asked."""
    with pytest.warns(microscale.errors.QuantizationNote, match="are executed as"):
        microscale.quantize(source, "mxfp4", activations="mxfp8", output=tmp_path / "out")
    assert read_config(tmp_path / "out")["microscale"]["layout"] == "compressed-tensors"
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_result_in_json_is_what_the_command_prints(source: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"format": "mxfp4", "activations": "mxfp8", "kv_cache": "mxfp8", "rules": ["k_proj=mxfp8"]}
    found = json_value(quantize(options_of(source, output=tmp_path / "out", **words)))
    flags = ("-f", "mxfp4", "-a", "mxfp8", "--kv-cache", "mxfp8", "--rule", "k_proj=mxfp8", "--overwrite", "--json")
    shown = succeed("quantize", source, *flags, "-o", tmp_path / "out").json
    assert found | {"seconds": 0} == shown | {"seconds": 0}
    assert [(one["weights"], one["activations"], one["layers"]) for one in shown["schemes"]] == [
        ("mxfp4", "mxfp8_e4m3", 12),
        ("mxfp8_e4m3", "mxfp8_e4m3", 2),
    ]
    nowhere = json_value(quantize(options_of(source, **words)))
    unwritten = {"output": None, "layout": None, "bits_per_weight_model": None, "bytes": None, "file_bytes": None}
    assert {key: nowhere[key] for key in unwritten} == unwritten
    assert nowhere["attention"] == shown["attention"] == {"products": None, "kv_cache": "mxfp8_e4m3"}


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
    ({"format": "mxfp4", "offload": 5}, OptionError, r"offload is a path \(str or Path\), got 5"),
    ({"format": "mxfp4", "offlad": "job"}, OptionError, "no option 'offlad'; did you mean offload"),
    ({"format": make_recipe(format="mxfp4"), "method": "gptq"}, RecipeError, "not both"),
    ({"format": "mxfp4", "method": "gptq", "effort": "good"}, RecipeError, "chooses a chain of method best"),
    ({"format": "mxfp4", "method": "auto", "bits": 5.0, "effort": "good"}, RecipeError, "add --method best"),
    ({"format": make_recipe(format="mxfp4"), "bits": 5.0}, RecipeError, "either --recipe or --bits"),
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
    for name in ("load_original", "LayerFile"):
        monkeypatch.setattr(originals, name, never)
    monkeypatch.setattr(job, "read_windows", never)
    given = {"calibration": "absent.txt", **options}
    with pytest.raises(kind, match=words):
        microscale.quantize(source, **given)


def test_a_model_in_memory_is_refused_as_it_is(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_original(source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(job, "read_windows", never)
    with pytest.raises(RecipeError, match="step gptq"):
        microscale.quantize(model, "mxfp4:stochastic(1)", method="gptq", calibration="absent.txt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_outline_that_cannot_be_built_is_no_obstacle(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(originals, "outline_model", lambda path: None)
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


@pytest.mark.parametrize("bits", [0.0, -1, math.inf, math.nan])
def test_a_budget_is_a_positive_number(bits: float) -> None:
    with pytest.raises(RecipeError, match="bits is a number above 0"):
        choose_recipe(RecipeOptions(format="mxfp4", bits=bits, method="auto"))


@pytest.mark.parametrize("bits", ["4.5bits", True])
def test_a_budget_is_a_number(bits: Any) -> None:
    with pytest.raises(OptionError, match="bits is a number, got"):
        RecipeOptions(format="mxfp4", bits=bits, method="auto")


def test_rules_of_auto_have_the_inputs_that_are_asked_for() -> None:
    words: dict[str, Any] = {"bits": 4.5, "method": "auto", "activations": "none"}
    found = choose_recipe(RecipeOptions(format=["mxfp4", "nvfp4"], rules=["mlp.down=nvfp4"], **words))
    assert isinstance(found, AutoRecipe)
    assert {one.activations for one in found.problem.candidates} == {None}
    assert [one.activations for _, one in found.problem.fixed] == [None]
    named = choose_recipe(RecipeOptions(format=["mxfp4/mxfp4", "nvfp4"], **words))
    assert isinstance(named, AutoRecipe)
    assert [str(one.activations) for one in named.problem.candidates] == ["mxfp4", "None"]


@pytest.mark.parametrize("method", ["auto:bits=4.5", "rtn+auto"])
def test_auto_is_no_step(method: str) -> None:
    with pytest.raises(RecipeError, match="auto is no step of a chain"):
        choose_recipe(RecipeOptions(bits=4.5, method=method))


@pytest.mark.parametrize("bits", [1e9, 4.8765432])
def test_a_budget_is_kept_to_the_last_digit(bits: float) -> None:
    steps = parse_method(with_budget(read_method("micromix"), bits).text).of_kind(MicroMix)
    assert [float(step.bits) for step in steps] == [bits]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({}, "about 12 min and 3.1 GB for 30 layers"),
        ({"layers": 1, "num_bytes": 0}, "about 12 min for 1 layer"),
        ({"device_bytes": 2_000_000_000}, "about 12 min, 3.1 GB and 2.0 GB of the GPU's memory for 30 layers"),
        (
            {"learning": ("refine",), "learning_seconds": 480.0},
            "about 12 min and 3.1 GB for 30 layers, 8 min of it refine",
        ),
        (
            {"learning": ("distill",), "is_ahead": True},
            "about 12 min and 3.1 GB for distill, before 30 layers are rounded",
        ),
    ],
)
def test_a_forecast_in_words(found: dict[str, Any], words: str) -> None:
    usual = {"layers": 30, "seconds": 700.0, "num_bytes": 3_100_000_000}
    assert job.forecast_text(Forecast(**(usual | found))) == words


def test_a_job_with_calibration_says_what_it_will_take(tmp_path: Path) -> None:
    """Once, on standard error and to a reporter; plain rounding says nothing."""
    path, text = save_random_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("It was a dark and stormy night. " * 8)
    words = ("--method", "gptq", "--calibration", text, "--samples", "2", "--window", "16")
    said = succeed("quantize", path, "-f", "mxfp4", "-o", tmp_path / "out", *words).stderr
    assert re.search(r"^about \d+ s and [\d.]+ [MG]B for 2 layers$", said, re.MULTILINE)
    assert "about" not in succeed("quantize", path, "-f", "mxfp4", "-o", tmp_path / "plain").stderr
    notes: list[str] = []

    class Listening(ProgressReporter):
        def note(self, text: str) -> None:
            notes.append(text)

    options = {"method": "gptq", "calibration": text, "samples": 2, "window": 16}
    microscale.quantize(str(path), "mxfp4", progress=Listening(), **options)
    assert len(notes) == 1 and notes[0].endswith("for 2 layers")
