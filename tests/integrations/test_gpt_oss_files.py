"""GPT-OSS models written as their published files are: blocks, scales, values and logits, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

import microscale
from microscale.errors import CheckpointWriteError, LayoutError, QuantizationNote
from microscale.integrations.checking import check_readable
from microscale.integrations.loading import load_original
from tiny_models import logits, save_tiny, tiny_model

PLACE = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a source in bfloat16 and what is written of it."""
    place = tmp_path_factory.mktemp("gpt-oss")
    save_tiny("gpt_oss", place / "source", dtype=torch.bfloat16)
    with pytest.warns(QuantizationNote, match="holds experts alone: 10 other layers stay as they are"):
        microscale.quantize(place / "source", "mxfp4", layout="gpt-oss", output=place / "out")
    return place


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def differing(one: Path, other: Path) -> list[str]:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))]


def quantize_again(source: Path, target: Path) -> Path:
    microscale.quantize(source, "mxfp4", layout="gpt-oss", output=target)
    return target


def stock(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )


def expand(directory: Path, target: Path) -> Path:
    """Let transformers write the floats that a packed file means."""
    model = stock(directory)
    model._weight_conversions = []  # else it names floats as if they were blocks
    model.save_pretrained(target)
    return target


def file_of_another_rule(written: Path, target: Path) -> Path:
    """Write a file whose blocks break the floor rule, with blocks of zeros of both signs and of small codes."""
    generator = torch.Generator().manual_seed(1)
    found = tensors(written / "out")
    for name, value in found.items():
        if name.endswith("_blocks"):
            value.copy_(torch.randint(0, 256, value.shape, dtype=torch.uint8, generator=generator))
            for row, mask in enumerate((0x99, 0xAA, 0xBB, 0xDD, 0x88, 0x00)):
                value[0, row::8] &= mask
        elif name.endswith("_scales"):
            value.copy_(torch.randint(90, 140, value.shape, dtype=torch.uint8, generator=generator))
    target.mkdir()
    save_file(found, target / "model.safetensors", metadata={"format": "pt"})
    described = {key: value for key, value in config(written / "out").items() if key != "microscale"}
    (target / "config.json").write_text(json.dumps(described))
    return target


def test_names_shapes_and_config_are_those_of_the_published_files(written: Path) -> None:
    source, found = tensors(written / "source"), tensors(written / "out")
    shapes = {name: list(value.shape) for name, value in found.items() if value.dtype == torch.uint8}
    assert {name: shape for name, shape in shapes.items() if ".0." in name} == {
        f"{PLACE}.gate_up_proj_blocks": [4, 192, 2, 16],
        f"{PLACE}.gate_up_proj_scales": [4, 192, 2],
        f"{PLACE}.down_proj_blocks": [4, 64, 3, 16],
        f"{PLACE}.down_proj_scales": [4, 64, 3],
    }
    left = source.keys() & found.keys()
    assert source.keys() - left == {
        f"model.layers.{i}.mlp.experts.{name}_proj" for i in (0, 1) for name in ("gate_up", "down")
    }
    assert all(source[name].dtype == torch.bfloat16 and torch.equal(source[name], found[name]) for name in left)
    assert config(written / "out")["quantization_config"] == {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    assert microscale.inspect(written / "out").layout == "gpt-oss"
    assert "File layout: gpt-oss" in (written / "out" / "README.md").read_text()


def test_each_block_is_the_rounding_of_the_source(written: Path) -> None:
    source, found = tensors(written / "source"), tensors(written / "out")
    for name in (f"{PLACE}.gate_up_proj", f"{PLACE}.down_proj"):
        expected = microscale.quantize_tensor(source[name].transpose(1, 2).contiguous(), "mxfp4")
        assert torch.equal(found[f"{name}_blocks"].flatten(), expected.parts["codes"].flatten())
        assert torch.equal(found[f"{name}_scales"].flatten(), expected.parts["scale"].flatten())


def test_stock_transformers_computes_the_same(written: Path) -> None:
    oracle = stock(written / "out").to(torch.float32)
    torch.testing.assert_close(
        logits(microscale.load(written / "out", dtype=torch.float32)), logits(oracle), rtol=1e-6, atol=1e-6
    )


def test_floats_of_a_file_give_the_same_file(written: Path, tmp_path: Path) -> None:
    """Expanded by transformers and by us: the same bytes in every tensor, and the same config."""
    by_us = load_original(written / "out")
    model: Any = microscale.quantize(by_us, "mxfp4", layout="gpt-oss")
    microscale.save(model, tmp_path / "ours", layout="gpt-oss")
    again = quantize_again(expand(written / "out", tmp_path / "floats"), tmp_path / "again")
    assert differing(written / "out", again) == differing(written / "out", tmp_path / "ours") == []
    assert config(written / "out") == config(again)


def test_values_of_any_rule_come_back_and_packed_files_keep_their_bytes(written: Path, tmp_path: Path) -> None:
    """The floats do not say which scale a block had, but hold its values; a packed source keeps all bytes."""
    other = file_of_another_rule(written, tmp_path / "other")
    floats = expand(other, tmp_path / "floats")
    again = quantize_again(floats, tmp_path / "again")
    assert len(differing(other, again)) == 8, "else the blocks follow the rule, and the test shows nothing"
    assert differing(floats, expand(again, tmp_path / "values")) == []
    assert differing(other, quantize_again(other, tmp_path / "carried")) == []
    microscale.save(microscale.load(other), tmp_path / "saved", layout="gpt-oss")
    assert differing(other, tmp_path / "saved") == []


def test_a_packed_source_keeps_its_bytes_in_other_layouts(written: Path, tmp_path: Path) -> None:
    other = file_of_another_rule(written, tmp_path / "other")
    microscale.quantize(
        other, "mxfp4", layout="microscale", include=["*.experts.*"], exclude=["self_attn.*"], output=tmp_path / "ours"
    )
    microscale.save(microscale.load(tmp_path / "ours"), tmp_path / "back", layout="gpt-oss")
    assert differing(other, tmp_path / "back") == []


def test_weights_that_changed_since_they_were_read_are_rounded(written: Path) -> None:
    model = load_original(written / "out")
    layer = model.get_submodule(f"{PLACE}.0.down_proj")
    layer.weight.data.mul_(1.3)
    expected = microscale.quantize_tensor(layer.weight.data.clone(), "mxfp4")
    found = microscale.quantize(model, "mxfp4", layout="gpt-oss").get_submodule(f"{PLACE}.0.down_proj").weight
    assert torch.equal(found, microscale.dequantize_tensor(expected))


def test_the_exact_rule_is_recorded(written: Path, tmp_path: Path) -> None:
    microscale.quantize(written / "source", "mxfp4:even", layout="gpt-oss", output=tmp_path / "out")
    found = microscale.inspect(tmp_path / "out").quantized
    assert {layer.format for layer in found} == {"mxfp4:even"}


def test_floats_that_bfloat16_does_not_hold_are_rounded_with_a_note(tmp_path: Path) -> None:
    model = microscale.quantize(tiny_model("gpt_oss"), "mxfp4", layout="gpt-oss")
    with pytest.warns(QuantizationNote, match="layout gpt-oss holds bfloat16: .* are rounded to it"):
        microscale.save(model, tmp_path / "out", layout="gpt-oss")
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.bfloat16, torch.uint8}
    assert microscale.load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("lost", ["down_proj_scales", "down_proj_blocks", "down_proj_bias"])
def test_a_file_that_is_not_whole_is_found(written: Path, tmp_path: Path, lost: str) -> None:
    whole = {name: value for name, value in tensors(written / "out").items() if name != f"{PLACE}.{lost}"}
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config(written / "out")))
    with pytest.raises(CheckpointWriteError, match="layout gpt-oss"):
        check_readable(tmp_path, "gpt-oss")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"format": "mxfp8"}, "holds MXFP4, not mxfp8_e4m3"),
        ({"activations": "mxfp8"}, "no place for the rounding of inputs"),
        ({"include": ["lm_head"]}, r"experts alone; every other layer stays in bfloat16 \(layer lm_head"),
        ({"rules": ["q_proj=mxfp4"]}, "layer model.layers.0.self_attn.q_proj"),
        ({"exclude": ["*.experts.2.up_proj"]}, "model.layers.0.mlp.experts.2.up_proj is to stay in floats"),
        ({"rules": ["gate_proj=mxfp4:even"]}, "one format there, but"),
        ({"kv_cache": "mxfp8"}, "no place for the rounding of attention"),
        ({"method": "hadamard"}, "leaves work for run time"),
    ],
)
def test_refusals(written: Path, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        microscale.quantize(
            written / "source", **{"format": "mxfp4", "layout": "gpt-oss", "output": tmp_path / "out", **options}
        )
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_otherwise_is_not_saved(tmp_path: Path) -> None:
    model = microscale.quantize(tiny_model("gpt_oss", dtype=torch.bfloat16), "mxfp4")
    with pytest.raises(LayoutError, match=r"cannot hold layer model.layers.0.self_attn.q_proj: .* experts alone"):
        microscale.save(model, tmp_path / "out", layout="gpt-oss")
