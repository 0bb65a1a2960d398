"""Architectures of transformers, tiny and random: quantized, saved, loaded here and there, all with equal logits.

Ten of them run always, one of each kind; the others are slow.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import microscale
import microscale.hf  # pyright: ignore[reportUnusedImport]  # registers with transformers
from microscale.families.forward_source import router_names
from microscale.families.parts import part_of, part_roots
from microscale.nn.packed import PackedModule
from small_models import same_bits
from tiny_models import VOCABULARY, logits, save_tiny, tiny_config

ALWAYS = [
    "llama",  # dense
    "gpt2",  # Conv1D
    "falcon",  # linear layers of its own class
    "gpt_oss",  # experts: transposed, in turn, with biases
    "jamba",  # hybrid with experts
    "mamba",  # reads weights itself
    "zamba2",  # shares layers
    "gemma3n_text",  # several residual streams
    "qwen3_5",  # sees, though its config has a class of text too
    "qwen3_vl",
]
"""One of each kind."""

OTHERS = """
afmoe apertus arcee aria_text aya_vision bamba bart bitnet bloom codegen cohere cohere2 deepseek_v2 deepseek_v3
deepseek_v32 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 falcon_h1 falcon_mamba flex_olmo gemma gemma2
gemma3 gemma4_text glm glm4 glm4_moe glm4v got_ocr2 gpt_bigcode gpt_neo gpt_neox gptj granite granitemoe
granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe idefics3 internvl jetmoe lfm2 lfm2_moe
llama4_text llava llava_next longcat_flash mamba2 minimax minimax_m2 minicpm3 mistral mistral3 mixtral mllama
modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmoe opt ovis2 paligemma persimmon phi phi3
phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5_moe qwen3_moe qwen3_next qwen3_vl_moe recurrent_gemma
rwkv seed_oss smollm3 smolvlm solar_open stablelm starcoder2 t5 whisper xglm xlstm
"""
SLOW = OTHERS.split()
FAMILIES = [*ALWAYS, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
WINDOWS = torch.randint(3, VOCABULARY - 20, (4, 32), generator=torch.Generator().manual_seed(1))
WITHOUT_STACK = {"t5", "bart", "whisper"}
"""What has an encoder: text does not run through it alone, so that nothing is calibrated."""


def quiet_quantize(source: Path, method: str) -> tuple[Any, list[str]]:
    """Quantize a model; returns it with what was said."""
    calibration = None if method == "rtn" else WINDOWS
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        model = microscale.quantize(source, "mxfp4", method=method, calibration=calibration)
    return model, [str(note.message) for note in notes]


def packed_share(model: Any) -> float:
    """Return which share of the matrices of the language part's layers is packed; routers and short convolutions do
    not count.
    """
    roots, routers, head = part_roots(model), router_names(model), model.get_output_embeddings()
    packed = sum(each.shape[0] * each.shape[1] for each in model.modules() if isinstance(each, PackedModule))
    floats = 0
    for name, parameter in model.named_parameters():
        module = name.rpartition(".")[0]
        owner = model.get_submodule(module)
        is_left = isinstance(owner, nn.Embedding | nn.Conv1d) or module in routers or owner is head
        is_matrix = parameter.ndim in (2, 3) and min(parameter.shape[-2:]) >= 32
        if is_matrix and not is_left and part_of(module, roots) == "language":
            floats += parameter.numel()
    return packed / max(packed + floats, 1)


@pytest.mark.parametrize("method", ["rtn", "gptq", "best"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_architecture_goes_through_and_lasts(family: str, method: str, tmp_path: Path) -> None:
    if method != "rtn" and family in WITHOUT_STACK:
        pytest.skip("its layers are not reached by text alone")
    source = save_tiny(family, tmp_path / "source")
    kind = type(microscale.load(source))
    before = logits(microscale.load(source))
    model, notes = quiet_quantize(source, method)
    assert type(model) is kind
    assert packed_share(model) >= 0.95 or any("stay as they are" in note for note in notes)
    expected = logits(model)
    similarity = functional.cosine_similarity(expected.float().flatten(), before.float().flatten(), dim=0)
    assert float(similarity) > 0.7, "a weight that was mixed up leaves nothing of the model"
    microscale.save(model, tmp_path / "out")
    assert same_bits(logits(microscale.load(tmp_path / "out")), expected)
    assert same_bits(logits(kind.from_pretrained(tmp_path / "out")), expected)


def test_the_names_of_the_list_are_families() -> None:
    assert len(ALWAYS) + len(SLOW) >= 60 and len({*ALWAYS, *SLOW}) == len(ALWAYS) + len(SLOW)
    for family in ALWAYS:
        assert tiny_config(family).model_type == family
