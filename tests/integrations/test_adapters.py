"""Adapters of PEFT are merged into the float weights of their base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import microscale
from command_line import fail, succeed
from microscale.errors import CheckpointError, ModelError, QuantizationNote
from microscale.integrations.loading import load_original
from small_models import read_tensors, same_bits, save_two_layers

LAYER = "model.layers.1.mlp.up_proj"


def adapter(folder: Path, **changes: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 256, generator=generator), torch.randn(704, 4, generator=generator)
    norm = torch.full((256,), 2.0)
    tensors = {
        f"base_model.model.{LAYER}.lora_A.weight": down,
        f"base_model.model.{LAYER}.lora_B.weight": up,
        "base_model.model.model.norm.weight": norm,
    }
    config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 8} | changes
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return {"change": up @ down, "norm": norm}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_two_layers(tmp_path / "base")


@pytest.mark.parametrize(
    ("changes", "factor"),
    [({}, 2.0), ({"use_rslora": True}, 4.0), ({"alpha_pattern": {"mlp.up_proj": 2}}, 0.5)],
)
def test_the_change_is_added(base: Path, tmp_path: Path, changes: dict[str, Any], factor: float) -> None:
    found = adapter(tmp_path / "adapter", **changes)
    before = read_tensors(base)
    with pytest.warns(QuantizationNote, match="merged into 1 layer of base"):
        after = load_original(tmp_path / "adapter").state_dict()
    expected = (before[f"{LAYER}.weight"].float() + found["change"] * factor).to(torch.bfloat16)
    assert same_bits(after[f"{LAYER}.weight"], expected)
    assert same_bits(after["model.norm.weight"], found["norm"].to(torch.bfloat16))
    other = "model.layers.0.mlp.up_proj.weight"
    assert same_bits(after[other], before[other])


def test_it_is_quantized_as_one_model(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    with pytest.warns(QuantizationNote, match="merged"):
        succeed("quantize", tmp_path / "adapter", "-f", "mxfp8", "-o", tmp_path / "out")
    weight = load_original(tmp_path / "adapter").get_submodule(LAYER).weight
    packed = microscale.load(tmp_path / "out").get_submodule(LAYER)
    assert same_bits(packed.weight, microscale.fake_quantize(weight.data, "mxfp8"))
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"base_model_name_or_path": None}, "names no base"),
        ({"base_model_name_or_path": "/absent/base"}, "absent/base"),
    ],
)
def test_what_is_not_merged_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    adapter(tmp_path / "adapter", **changes)
    assert said in fail("quantize", tmp_path / "adapter", "-f", "mxfp8", "-o", tmp_path / "out")


def test_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    wrong = {f"base_model.model.{LAYER}.lora_A.weight": torch.zeros(4, 8)}
    save_file(wrong, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lora_B"):
        load_original(tmp_path / "adapter")
    save_file(
        {"base_model.model.x.lora_A.weight": torch.zeros(4, 8)}, tmp_path / "adapter" / "adapter_model.safetensors"
    )
    with pytest.raises(ModelError, match="'x'"):
        load_original(tmp_path / "adapter")


def test_a_model_without_its_numbers_is_refused(base: Path) -> None:
    model = load_original(base)
    model.model.norm.to("meta")
    with pytest.raises(ModelError, match=r"model\.norm\.weight has no numbers"):
        microscale.quantize(model, "mxfp8")
