"""Checkpoints of other tools become running models: GGUF and gpt-oss, with transformers' own loaders as oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

import microscale
from gguf_files import as_llama_cpp, llama_tensors, write
from microscale.errors import CheckpointError, CheckpointNotFoundError
from microscale.nn.embedding import QuantizedEmbedding
from microscale.nn.linear import QuantizedLinear
from microscale.planning.inspection import inspect_checkpoint

TOKENS = torch.arange(20).reshape(2, 10)


def test_gguf_runs_packed_and_equals_transformers(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", as_llama_cpp(llama_tensors()))
    model = microscale.load(file, dtype=torch.float32)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert torch.equal(model(TOKENS).logits, oracle(TOKENS).logits)


def test_gguf_with_a_tied_packed_embedding(tmp_path: Path) -> None:
    tensors = as_llama_cpp(llama_tensors())
    del tensors["output.weight"]
    file = write(tmp_path / "tied.gguf", tensors)
    model = microscale.load(file, dtype=torch.float32)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert torch.equal(model(TOKENS).logits, oracle(TOKENS).logits)


def test_gguf_can_be_saved_in_our_layout(tmp_path: Path) -> None:
    model = microscale.load(write(tmp_path / "tiny.gguf", as_llama_cpp(llama_tensors())))
    microscale.save(model, tmp_path / "out")
    again = microscale.load(tmp_path / "out")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_gguf_is_inspected(tmp_path: Path) -> None:
    found = inspect_checkpoint(write(tmp_path / "tiny.gguf", as_llama_cpp(llama_tensors())))
    assert found.layout == "gguf"
    assert {layer.format for layer in found.quantized} == {"mxfp4"}
    assert found.bits_per_quantized_weight == 4.25


@pytest.mark.parametrize("name", ["absent.gguf", "empty.gguf"])
def test_bad_gguf(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(CheckpointNotFoundError if name == "absent.gguf" else CheckpointError):
        microscale.load(tmp_path / name)


def gpt_oss_checkpoint(directory: Path) -> None:
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
    torch.manual_seed(0)
    state = {name: value.to(torch.bfloat16) for name, value in GptOssForCausalLM(config).state_dict().items()}
    for stem, cols in (("gate_up_proj", 64), ("down_proj", 32)):
        name = f"model.layers.0.mlp.experts.{stem}"
        packed = microscale.quantize_tensor(state.pop(name).transpose(1, 2).contiguous(), "mxfp4")
        experts, rows, _ = packed.shape
        state[f"{name}_blocks"] = packed.parts["codes"].reshape(experts, rows, cols // 32, 16)
        state[f"{name}_scales"] = packed.parts["scale"].reshape(experts, rows, cols // 32)
    config.dtype = torch.bfloat16
    config.quantization_config = Mxfp4Config(modules_to_not_convert=["lm_head"]).to_dict()
    config.save_pretrained(directory)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def test_gpt_oss_runs_packed_and_equals_transformers(tmp_path: Path) -> None:
    """Every expert is a packed layer, run by the processor's kernels; its rows and biases are those of the file."""
    gpt_oss_checkpoint(tmp_path)
    model = microscale.load(tmp_path, dtype=torch.float32)
    oracle: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    oracle = oracle.to(torch.float32)
    inside = {name: each for name, each in model.named_modules() if isinstance(each, QuantizedLinear)}
    assert len(inside) == 9 and all(".experts." in name for name in inside)
    stacked = oracle.model.layers[0].mlp.experts
    for index in range(3):
        expert = model.model.layers[0].mlp.experts.expert(index)
        assert torch.equal(expert.gate_proj.weight, stacked.gate_up_proj[index].T[::2])
        assert torch.equal(expert.up_proj.weight, stacked.gate_up_proj[index].T[1::2])
        assert torch.equal(expert.up_proj.bias, stacked.gate_up_proj_bias[index, 1::2])
        assert torch.equal(expert.down_proj.weight, stacked.down_proj[index].T)
        assert torch.equal(expert.down_proj.bias, stacked.down_proj_bias[index])
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, oracle(TOKENS).logits, rtol=1e-4, atol=1e-4)
    for described in (microscale.explain(model), microscale.explain(tmp_path)):
        backends = {layer.layer: layer.backend for layer in described.layers if ".experts." in layer.layer}
        assert len(backends) == 9 and set(backends.values()) == {"cpu"}


def test_gpt_oss_is_inspected(tmp_path: Path) -> None:
    gpt_oss_checkpoint(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert found.layout == "gpt-oss"
    assert found.bits_per_quantized_weight == 4.25
