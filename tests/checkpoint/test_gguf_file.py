"""GGUF: golden bytes, gguf-py and transformers as oracles on whole tiny models, damaged files."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gguf_files import (
    EXPERTS,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    QUERY,
    Type,
    as_llama_cpp,
    expert_tensors,
    gguf,
    header_of,
    llama_tensors,
    random,
    rounded,
    write,
)
from microscale.checkpoint.gguf_file import GgufModel, read_gguf
from microscale.errors import CheckpointError, DependencyError
from microscale.formats import parse_format
from microscale.kernels import dequantize, quantize
from microscale.layouts import unpack_bits


def values_of(model: GgufModel, name: str) -> Tensor:
    return dequantize(model.load_layer(name), torch.float32)


def test_golden_block(tmp_path: Path) -> None:
    block = np.zeros((1, 34), dtype=np.uint8)
    block[0, 0], block[0, 1], block[0, 16] = 128, 0x21, 0xF0  # element 0 is .5, 16 is 1, 31 is -6, times 2
    block[0, 17], block[0, 33] = 126, 0x0A  # element 32 + 15 is -1, times 1/2
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen2")
    writer.add_tensor("blk.7.ffn_down.weight", block, raw_dtype=Type.MXFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = read_gguf(tmp_path / "model.gguf", dtype=torch.float16)
    name = "model.layers.7.mlp.down_proj"
    layer = model.layers[name]
    assert (layer.shape, layer.kind, layer.dtype, layer.format) == (
        (1, 64),
        "linear",
        torch.float16,
        parse_format("mxfp4"),
    )
    tensor = model.load_layer(name)
    assert tensor.parts["scale"].tolist() == [[128, 126]]
    assert tensor.parts["codes"].tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0xF0] + [0] * 7 + [0xA0] + [0] * 8
    ]
    expected = torch.zeros(1, 64)
    expected[0, [0, 16, 31, 47]] = torch.tensor([1.0, 2.0, -12.0, -0.5])
    assert torch.equal(values_of(model, name), expected)


def test_every_code_and_scale_equals_gguf_py(tmp_path: Path) -> None:
    codes = np.tile(np.arange(16, dtype=np.uint8) * 0x11, (255, 1))
    blocks = np.concatenate([np.arange(255, dtype=np.uint8)[:, None], codes], axis=1)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("output.weight", blocks, raw_dtype=Type.MXFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = read_gguf(tmp_path / "model.gguf")
    tensor = model.load_layer("lm_head")
    assert torch.equal(unpack_bits(tensor.parts["codes"], 4, 32), torch.arange(16, dtype=torch.uint8).repeat(255, 2))
    with np.errstate(over="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(blocks, Type.MXFP4))
    assert torch.equal(dequantize(tensor, torch.float32), expected)


def test_scale_255_is_nan(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header_of() + bytes([255] + [0x11] * 16))
    assert values_of(read_gguf(path), "lm_head").isnan().all()


def test_bytes_are_those_that_we_quantize_to(tmp_path: Path) -> None:
    values = 2.0 ** np.random.default_rng(1).integers(-3, 3, (8, 64)).astype(np.float32)  # no ties, no clipping
    model = read_gguf(write(tmp_path / "model.gguf", {"output.weight": (values, Type.MXFP4)}))
    expected = quantize(torch.from_numpy(values), parse_format("mxfp4"))
    assert torch.equal(dequantize(expected), values_of(model, "lm_head"))
    assert torch.equal(expected.parts["scale"], model.load_layer("lm_head").parts["scale"])


LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.0.attn_norm": "model.layers.0.input_layernorm",
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
}


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", as_llama_cpp(llama_tensors()))


def state_of(model: GgufModel) -> dict[str, Tensor]:
    state = {name: model.load_tensor(name).float() for name in model.tensors}
    return state | {f"{name}.weight": values_of(model, name) for name in model.layers}


@pytest.mark.parametrize("kind", ["MXFP4", "Q8_0", "Q4_0", "F16", "BF16", "F32"])
def test_llama_in_every_type(tmp_path: Path, kind: str) -> None:
    tensors = llama_tensors(Type[kind])
    model = read_gguf(write(tmp_path / "model.gguf", as_llama_cpp(tensors)))
    assert (model.architecture, model.ignored, bool(model.layers)) == ("llama", (), kind == "MXFP4")
    state = state_of(model)
    assert set(state) == {f"{name}.weight" for name in LLAMA_NAMES.values()}
    for name, (values, stored) in tensors.items():
        target = f"{LLAMA_NAMES[name.removesuffix('.weight')]}.weight"
        assert torch.equal(state[target], rounded(values, stored)), target
        if target in model.tensors:
            dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored.name, torch.float32)
            assert model.load_tensor(target).dtype == dtype
            assert model.tensors[target].shape == tuple(state[target].shape)
    if kind == "MXFP4":
        assert {name: layer.kind for name, layer in model.layers.items() if layer.kind != "linear"} == {
            "model.embed_tokens": "embedding"
        }


def test_transformers_loads_the_same_weights(llama_file: Path) -> None:
    oracle = AutoModelForCausalLM.from_pretrained(llama_file.parent, gguf_file=llama_file.name, dtype=torch.float32)
    state = state_of(read_gguf(llama_file))
    expected = oracle.state_dict()
    assert set(state) == set(expected)
    for name, values in state.items():
        assert torch.equal(values, expected[name]), name
    config = AutoConfig.from_pretrained(llama_file.parent, gguf_file=llama_file.name)
    model = LlamaForCausalLM(LlamaConfig(**config.to_dict()))
    model.load_state_dict(state)
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens).logits, oracle(tokens).logits)


def test_metadata_is_handed_over(llama_file: Path) -> None:
    reader = gguf.GGUFReader(llama_file)
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert dict(read_gguf(llama_file).metadata) == expected


def test_biases_norms_and_computed_tensors(tmp_path: Path) -> None:
    bias = random(QUERY, seed=20)
    tensors = {
        **llama_tensors(),
        "blk.0.attn_q.bias": (bias, Type.F32),
        "rope_freqs.weight": (random(16), Type.F32),
    }
    model = read_gguf(write(tmp_path / "llama.gguf", as_llama_cpp(tensors)))
    assert torch.equal(model.load_tensor("model.layers.0.self_attn.q_proj.bias"), torch.from_numpy(bias))
    assert model.ignored == ("rope_freqs.weight",)
    tensors = {
        **llama_tensors(),
        "blk.0.attn_q.bias": (bias, Type.F32),
        "blk.0.attn_q_norm.weight": (random(32), Type.F32),
    }
    del tensors["output.weight"]
    model = read_gguf(write(tmp_path / "qwen3.gguf", tensors, "qwen3"))
    assert torch.equal(model.load_tensor("model.layers.0.self_attn.q_proj.bias"), torch.from_numpy(bias))
    assert model.tensors["model.layers.0.self_attn.q_norm.weight"].shape == (32,)
    assert "lm_head" not in model.layers
    q_proj = llama_tensors()["blk.0.attn_q.weight"][0]
    assert torch.equal(values_of(model, "model.layers.0.self_attn.q_proj"), rounded(q_proj, Type.MXFP4))


GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize("arch", ["llama", "qwen2moe", "qwen3moe"])
def test_experts(tmp_path: Path, arch: str) -> None:
    tensors = expert_tensors(Type.MXFP4, Type.MXFP4, Type.MXFP4)
    model = read_gguf(write(tmp_path / "model.gguf", tensors, arch))
    assert {name: (layer.kind, layer.shape) for name, layer in model.layers.items()} == {
        GATE_UP: ("experts", (EXPERTS, 2 * INTERMEDIATE, HIDDEN)),
        DOWN: ("experts", (EXPERTS, HIDDEN, INTERMEDIATE)),
    }
    parts = {name: rounded(*tensors[f"blk.0.ffn_{name}_exps.weight"]) for name in ("gate", "up", "down")}
    assert torch.equal(values_of(model, GATE_UP), torch.cat([parts["gate"], parts["up"]], dim=1))
    assert torch.equal(values_of(model, DOWN), parts["down"])
    # A router is no linear module: it is dequantized.
    router = model.load_tensor("model.layers.0.mlp.gate.weight")
    assert torch.equal(router, rounded(*tensors["blk.0.ffn_gate_inp.weight"]))


def test_experts_of_mixed_types_are_floats(tmp_path: Path) -> None:
    tensors = expert_tensors(Type.MXFP4, Type.Q8_0, Type.Q8_0)
    model = read_gguf(write(tmp_path / "model.gguf", tensors, "qwen3moe"))
    assert not model.layers
    gate, up = (rounded(*tensors[f"blk.0.ffn_{name}_exps.weight"]) for name in ("gate", "up"))
    assert torch.equal(model.load_tensor(GATE_UP), torch.cat([gate, up], dim=1))


@pytest.mark.parametrize("kind", ["MXFP4", "Q8_0"])
def test_gpt_oss_experts_alternate(tmp_path: Path, kind: str) -> None:
    tensors = expert_tensors(Type[kind], Type[kind], Type[kind]) | {
        "blk.0.ffn_gate_exps.bias": (random(EXPERTS, INTERMEDIATE, seed=7), Type.F32),
        "blk.0.ffn_up_exps.bias": (random(EXPERTS, INTERMEDIATE, seed=8), Type.F32),
        "blk.0.ffn_down_exps.bias": (random(EXPERTS, HIDDEN, seed=9), Type.F32),
        "blk.0.attn_sinks.weight": (random(HEADS), Type.F32),
        "blk.0.post_attention_norm.weight": (random(HIDDEN), Type.F32),
    }
    model = read_gguf(write(tmp_path / "model.gguf", tensors, "gpt-oss"))
    names = {"mlp.router.weight", "self_attn.sinks", "post_attention_layernorm.weight"}
    assert {f"model.layers.0.{name}" for name in names} | {f"{GATE_UP}_bias", f"{DOWN}_bias"} <= set(model.tensors)
    gate_up = torch.empty(EXPERTS, 2 * INTERMEDIATE, HIDDEN)
    gate_up[:, 0::2] = rounded(*tensors["blk.0.ffn_gate_exps.weight"])
    gate_up[:, 1::2] = rounded(*tensors["blk.0.ffn_up_exps.weight"])
    if kind == "MXFP4":
        assert torch.equal(values_of(model, GATE_UP), gate_up)
    else:  # transformers keeps float experts of gpt-oss as [experts, cols, rows]
        assert torch.equal(model.load_tensor(GATE_UP), gate_up.transpose(1, 2))
        assert model.tensors[GATE_UP].shape == (EXPERTS, HIDDEN, 2 * INTERMEDIATE)
    bias = torch.from_numpy(tensors["blk.0.ffn_gate_exps.bias"][0])
    assert torch.equal(model.load_tensor(f"{GATE_UP}_bias")[:, 0::2], bias)


def test_unknown_names_to_load(llama_file: Path) -> None:
    model = read_gguf(llama_file)
    with pytest.raises(CheckpointError, match=r"no MXFP4 layer 'model\.norm'"):
        model.load_layer("model.norm")
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head.weight' beside"):
        model.load_tensor("lm_head.weight")


def test_mxfp4_and_floats_need_no_library(llama_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write(tmp_path / "q8.gguf", as_llama_cpp(llama_tensors(Type.Q8_0)))
    real_import = builtins.__import__

    def no_gguf(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_gguf)
    assert len(state_of(read_gguf(llama_file))) == len(LLAMA_NAMES)
    with pytest.raises(DependencyError, match=r"microscale\[compat\]"):
        read_gguf(other)


def test_a_file_made_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header_of() + bytes([127, *[0x76] * 16]))
    values = values_of(read_gguf(path), "lm_head")
    assert torch.equal(values, torch.tensor([[4.0] * 16 + [6.0] * 16]))
