"""Models that multiply by the weights of their layers themselves, and models with routers.

What is quantized of them, and what they then compute in memory and from a file.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

import microscale
from microscale.nn.packed import PackedModule
from small_models import same_bits

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MIX = SIZES | {"num_experts": 4, "num_experts_per_tok": 2}
STATE = SIZES | {"state_size": 4, "time_step_rank": 32}
HYBRID = MIX | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 32}
ROUTED = MIX | {"moe_intermediate_size": 32, "num_dense_layers": 0, "head_dim": 16, "num_shared_experts": 1}
FAMILIES = {"mamba": STATE, "falcon_mamba": STATE, "jamba": HYBRID, "afmoe": ROUTED}
TOKENS = torch.arange(3, 35)[None]


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(transformers.AutoConfig.for_model(family, **FAMILIES[family])).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("dt_proj.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits.to(torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["rtn", "hadamard+rtn"])
def test_a_method_that_transforms_inputs_keeps_the_function(family: str, method: str) -> None:
    """In eight bits the transformed model is near the original: a weight read in the transformed space is not."""
    model = tiny(family)
    before = logits(model)
    after = logits(microscale.quantize(model, "mxfp8", method=method))
    assert float(functional.cosine_similarity(before, after, dim=-1).min()) > 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_in_memory_and_from_a_file_are_the_same(family: str, tmp_path: Path) -> None:
    tiny(family, torch.bfloat16).save_pretrained(tmp_path / "source")
    in_memory = microscale.quantize(tmp_path / "source", "mxfp4", activations="mxfp8")
    expected = logits(in_memory)
    microscale.save(in_memory, tmp_path / "out")
    assert same_bits(logits(microscale.load(tmp_path / "out")), expected)


def test_a_layer_that_is_read_keeps_its_inputs_and_says_so() -> None:
    with pytest.warns(microscale.errors.QuantizationNote, match="multiplies by the weights of 6 layer"):
        microscale.quantize(tiny("mamba"), "mxfp4", activations="mxfp8")


def test_a_router_is_quantized_only_where_it_is_named() -> None:
    plain = microscale.quantize(tiny("afmoe"), "mxfp8")
    named = microscale.quantize(tiny("afmoe"), "mxfp8", include=["*.router.gate"])
    packed = [
        {name for name, module in model.named_modules() if isinstance(module, PackedModule)} for model in (plain, named)
    ]
    assert packed[1] - packed[0] == {f"model.layers.{layer}.mlp.router.gate" for layer in range(2)}


def servers_refuse(**options: Any) -> list[str]:
    """Return what is said of layers that servers join."""
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(transformers.AutoConfig.for_model("llama", **SIZES))
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        microscale.quantize(model, "mxfp4", **options)
    return [str(note.message) for note in notes if "vLLM" in str(note.message)]


def test_layers_that_servers_join_and_that_differ_are_named() -> None:
    (text,) = servers_refuse(rules=["*.q_proj=mxfp8"])
    assert "q_proj, k_proj, v_proj of model.layers.0.self_attn" in text and "2 modules" in text
    assert len(servers_refuse(exclude=["*.1.mlp.up_proj"])) == 1, "a layer in floats differs too"
    assert servers_refuse() == servers_refuse(rules=["*.down_proj=mxfp8", "*.o_proj=mxfp8"]) == []
