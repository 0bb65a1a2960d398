"""What the first users stumbled over: each finding is a test now."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import microscale
from microscale.cli.app import app
from microscale.cli.inspect_command import group_names
from microscale.errors import DtypeError, FormatSpecError, RecipeError
from microscale.evaluation.perplexity import perplexity
from microscale.recipes.recipe import parse_rule

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-6m"


@pytest.mark.parametrize("output_name", ["source", "source/../source", "link", "."])
def test_the_source_is_never_overwritten(tmp_path: Path, output_name: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(MODEL, source)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(source)
    before = (source / "model.safetensors").read_bytes()
    target = str(tmp_path / output_name)
    result = CliRunner().invoke(app, ["quantize", str(source), "-f", "mxfp4", "-o", target, "--overwrite", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["class"] == "CheckpointWriteError"
    assert (source / "model.safetensors").read_bytes() == before


def test_nan_losses_give_a_nan_perplexity() -> None:
    windows = [torch.tensor([0, 1, 2])]
    result = perplexity(lambda batch: torch.full((*batch.token_ids.shape, 4), float("nan")), windows)
    assert math.isnan(result.perplexity)


def test_names_are_grouped_and_none_is_left_out() -> None:
    names = [f"model.layers.{layer}.q_proj" for layer in (0, 1, 2, 5)] + ["model.layers.3.k_proj", "lm_head"]
    assert group_names(names) == ["model.layers.{0-2,5}.q_proj", "model.layers.3.k_proj", "lm_head"]


def test_activations_without_weights_are_refused() -> None:
    with pytest.raises(RecipeError, match="quantizes activations"):
        parse_rule("*.q_proj=none/mxfp8")
    assert str(parse_rule("*.q_proj=none/none").weights) == "none"


def test_a_list_is_no_tensor() -> None:
    with pytest.raises(DtypeError, match="a torch tensor"):
        microscale.quantize_tensor([1.0, 2.0], "mxfp4")  # pyright: ignore[reportArgumentType]


def test_a_misspelt_name_gets_a_suggestion() -> None:
    with pytest.raises(FormatSpecError, match="did you mean mxfp4_plus"):
        microscale.parse_format("mxfp4_plsu")
