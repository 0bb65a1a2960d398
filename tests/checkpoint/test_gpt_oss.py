"""The gpt-oss layout: golden bytes, transformers' own dequantization as oracle, damaged files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.utils.quantization_config import Mxfp4Config

from microscale.checkpoint.gpt_oss import GptOssLayout
from microscale.checkpoint.schema import TensorInfo
from microscale.errors import CheckpointError
from microscale.formats import parse_activation, parse_format
from microscale.kernels import dequantize, quantize
from microscale.layer_spec import LayerSpec

LAYOUT = GptOssLayout()
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def random_experts(seed: int, experts: int = 3, rows: int = 64, column_blocks: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, column_blocks, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 125, (experts, rows, column_blocks), dtype=torch.uint8, generator=generator)
    return blocks, scales


def tensors_of_file() -> dict[str, Tensor]:
    tensors = {"lm_head.weight": torch.zeros(8, 64, dtype=torch.bfloat16), f"{GATE_UP}_bias": torch.zeros(3, 64)}
    for seed, name in enumerate((GATE_UP, DOWN)):
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = random_experts(seed)
    return tensors


def read(tensors: dict[str, Tensor]) -> dict[str, LayerSpec]:
    infos = {name: TensorInfo(dtype=value.dtype, shape=tuple(value.shape)) for name, value in tensors.items()}
    return LAYOUT.stored_layers(CONFIG, infos, torch.bfloat16)


def test_golden_bytes() -> None:
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, :3] = torch.tensor([0x10, 0x32, 0xF9])
    blocks[0, 1, 0, 15] = 0x70
    tensors = {f"{GATE_UP}_blocks": blocks, f"{GATE_UP}_scales": torch.tensor([[[127], [130]]], dtype=torch.uint8)}
    layer = read(tensors)[GATE_UP]
    assert (layer.kind, layer.shape, layer.format) == ("experts", (1, 2, 32), parse_format("mxfp4"))
    assert LAYOUT.tensor_names(layer) == [f"{GATE_UP}_blocks", f"{GATE_UP}_scales"]
    values = dequantize(LAYOUT.unpack(layer, tensors.__getitem__))
    assert values[0, 0, :6].tolist() == [0, 0.5, 1, 1.5, -0.5, -6]
    assert values[0, 1, 31].item() == 6 * 2**3
    assert values.count_nonzero() == 6


def test_equals_the_dequantization_of_transformers() -> None:
    tensors = tensors_of_file()
    found = read(tensors)
    assert list(found) == [DOWN, GATE_UP]
    for name, layer in found.items():
        tensor = LAYOUT.unpack(layer, tensors.__getitem__)
        assert tensor.shape == layer.shape == (3, 64, 64)
        oracle = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.bfloat16)
        assert torch.equal(dequantize(tensor).transpose(1, 2), oracle)


def test_bytes_are_those_that_we_quantize_to() -> None:
    values = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(5))
    expected = quantize(values, parse_format("mxfp4"))
    blocks = expected.parts["codes"].reshape(3, 64, 2, 16)
    tensors = {f"{DOWN}_blocks": blocks, f"{DOWN}_scales": expected.parts["scale"].reshape(3, 64, 2)}
    found = LAYOUT.unpack(read(tensors)[DOWN], tensors.__getitem__)
    assert all(torch.equal(found.parts[part], expected.parts[part]) for part in expected.parts)


def test_a_tiny_model_gets_the_experts_that_transformers_loads(tmp_path: Path) -> None:
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=64,
        layer_types=["full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    state = {name: value.to(torch.bfloat16) for name, value in GptOssForCausalLM(config).state_dict().items()}
    for seed, (name, column_blocks) in enumerate(((GATE_UP, 2), (DOWN, 1))):
        del state[name]
        state[f"{name}_blocks"], state[f"{name}_scales"] = random_experts(seed, column_blocks=column_blocks)
    config.quantization_config = Mxfp4Config(modules_to_not_convert=["lm_head"]).to_dict()
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    for name, layer in read(state).items():
        parameter = model.get_parameter(name)
        assert torch.equal(dequantize(LAYOUT.unpack(layer, state.__getitem__)).transpose(1, 2), parameter)


def test_packing_undoes_unpacking() -> None:
    tensors = tensors_of_file()
    packed: dict[str, Tensor] = {}
    for layer in read(tensors).values():
        packed |= LAYOUT.pack(layer, LAYOUT.unpack(layer, tensors.__getitem__))
    assert len(packed) == 4 and all(torch.equal(value, tensors[name]) for name, value in packed.items())


def test_the_config_is_that_of_the_published_files() -> None:
    patterns = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    left = ["model.layers.11.self_attn.q_proj", "model.layers.0.mlp.router", "lm_head", "score"]
    assert LAYOUT.config([], left[:3]) == {"quant_method": "mxfp4", "modules_to_not_convert": patterns}
    assert LAYOUT.config([], left)["modules_to_not_convert"] == [*patterns, "score"]


LINEAR = LayerSpec(
    name="model.layers.0.mlp.experts.11.up_proj",
    format=parse_format("mxfp4"),
    shape=(64, 96),
    dtype=torch.bfloat16,
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"format": parse_format("mxfp4:even")}, None),
        ({"name": "model.layers.0.mlp.experts.gate_up_proj", "kind": "experts", "shape": (3, 64, 96)}, None),
        ({"name": "model.layers.0.self_attn.q_proj"}, "experts alone"),
        ({"name": "lm_head"}, "experts alone"),
        ({"kind": "embedding"}, "experts alone"),
        ({"format": parse_format("mxfp8")}, "holds MXFP4, not mxfp8_e4m3"),
        ({"format": parse_format("nvfp4")}, "holds MXFP4, not nvfp4"),
        ({"format": parse_format("mxfp4_plus")}, "holds MXFP4, not mxfp4_plus"),
        ({"activations": parse_activation("mxfp8")}, "no place for the rounding of inputs"),
        ({"shape": (64, 80)}, "80 is not a multiple of 32"),
        ({"low_rank": 4}, "no place for a low-rank side path"),
    ],
)
def test_what_the_layout_holds(changes: dict[str, Any], reason: str | None) -> None:
    refusal = LAYOUT.refusal(dataclasses.replace(LINEAR, **changes))
    assert refusal is None if reason is None else reason in (refusal or "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{DOWN}_scales": None}, "down_proj_scales' is missing"),
        ({f"{DOWN}_blocks": None}, "down_proj_scales' has no _blocks"),
        ({f"{DOWN}_scales": torch.zeros(3, 64, 2)}, "must be uint8, got torch.float32"),
        ({f"{DOWN}_blocks": torch.zeros(3, 64, 2, 16)}, "must be uint8, got torch.float32"),
        ({f"{DOWN}_scales": torch.zeros(3, 64, 3, dtype=torch.uint8)}, "a scale for each block"),
        ({f"{DOWN}_scales": torch.zeros(3, 128, dtype=torch.uint8)}, "a scale for each block"),
        ({f"{DOWN}_blocks": torch.zeros(3, 64, 2, 17, dtype=torch.uint8)}, "column blocks, 16"),
        ({f"{DOWN}_blocks": torch.zeros(3, 64, 32, dtype=torch.uint8)}, "column blocks, 16"),
    ],
)
def test_damaged_files(changes: dict[str, Tensor | None], message: str) -> None:
    tensors = {name: value for name, value in (tensors_of_file() | changes).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        read(tensors)


def test_a_file_without_blocks() -> None:
    with pytest.raises(CheckpointError, match="not quantized"):
        read({"lm_head.weight": torch.zeros(8, 64)})
