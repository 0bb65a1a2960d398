"""`microscale inspect`: its table, and the lines below it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from command_line import fail, succeed
from microscale.cli.inspect_command import group_layers
from microscale.cli.output import console
from microscale.planning.inspection import LayerFacts
from small_models import LLAMA_6M, save_random_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    source = save_random_model(folder / "model", num_hidden_layers=3)
    rules = ("--rule", "down_proj=mxfp8/mxfp8", "--rule", "layers.1.self_attn.*=none", "--exclude", "o_proj")
    succeed("quantize", source, "-f", "mxfp4_plus", *rules, "-o", folder / "out")
    return folder / "out"


def test_the_text_answer(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 200)
    answer = succeed("inspect", checkpoint).stdout
    assert "12 layers in mxfp4_plus: scale rule floor, rounding nearest_even" in answer
    assert "3 layers in mxfp8_e4m3: scale rule rceil" in answer
    assert "lm_head" not in answer
    assert "embed_tokens" in "".join(succeed("inspect", checkpoint, "--all").stdout.split())


def test_an_unquantized_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 200)
    assert "bfloat16" in succeed("inspect", LLAMA_6M).stdout


def test_a_path_with_brackets(checkpoint: Path, tmp_path: Path) -> None:
    """The terminal library reads [bold] and [/bold] as markup; a path may hold them."""
    shutil.copytree(checkpoint, tmp_path / "a[bold]b")
    place = tmp_path / "[" / "bold]"
    shutil.copytree(checkpoint, place)
    assert "[bold]" in "".join(succeed("inspect", tmp_path / "a[bold]b").stdout.split())
    assert "[/bold]" in "".join(succeed("inspect", place).stdout.split())
    assert "[/bold]" in fail("inspect", tmp_path / "[" / "bold]" / "absent")


def facts(name: str, num_bytes: int = 8) -> LayerFacts:
    return LayerFacts(
        name=name,
        shape=(4, 4),
        format="mxfp4",
        activations=None,
        method="rtn",
        num_weights=16,
        num_bytes=num_bytes,
        float_bytes=32,
    )


def test_layers_are_grouped_by_their_numbers() -> None:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1, 2, 7, 9, 10)]
    experts = [f"h.{layer}.experts.{expert}.w1" for layer in (0, 1) for expert in (0, 1, 2)]
    groups = group_layers(
        [*map(facts, names), facts("lm_head"), facts("model.layers.3.mlp.up_proj", 9), *map(facts, experts)]
    )
    assert {name: len(members) for name, members in groups.items()} == {
        "model.layers.{0-2,7,9-10}.mlp.up_proj": 6,
        "lm_head": 1,
        "model.layers.3.mlp.up_proj": 1,
        "h.{0-1}.experts.{0-2}.w1": 6,
    }


def test_what_runs_at_run_time_is_shown(checkpoint: Path, tmp_path: Path) -> None:
    source = checkpoint.parent / "model"
    text = tmp_path / "text.txt"
    text.write_text("The harbour was quiet. " * 40)
    taught = ("--calibration", text, "--samples", "2", "--window", "32", "-o", tmp_path / "out")
    succeed("quantize", source, "-f", "mxfp4", "--method", "hadamard+rtn+lowrank:rank=4", *taught)
    found = succeed("inspect", tmp_path / "out", "--json").json
    assert {layer["online"] for layer in found["layers"]} == {"hadamard(32), low rank 4"}
    shown = succeed("inspect", tmp_path / "out").stdout
    assert f"at run time {len(found['layers'])} layers also: hadamard(32), low rank 4" in shown
    assert "at run time" not in succeed("inspect", checkpoint).stdout
