"""Tiny random models of every family, built in memory; norms and biases are random too, so that a mix-up shows."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GEMMA = _LLAMA | {"head_dim": 8, "tie_word_embeddings": True}
_MOE = _LLAMA | {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}
_OPT = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "vocab_size": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 16,
    "fullatt_block_indexes": [1],
}
IMAGE_TOKEN = 90
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "llama-biases-tied": ("llama", _LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", _LLAMA),
    "qwen2": ("qwen2", _LLAMA),
    "qwen3": ("qwen3", _LLAMA | {"head_dim": 16}),
    "gemma": ("gemma", _GEMMA),
    "gemma2": ("gemma2", _GEMMA | {"query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3": ("gemma3_text", _GEMMA | {"query_pre_attn_scalar": 8, "sliding_window": 16}),
    "smollm3": ("smollm3", _LLAMA),
    "granite": (
        "granite",
        _LLAMA
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 2.0},
    ),
    "stablelm": ("stablelm", _LLAMA | {"use_qkv_bias": True}),
    "olmo2": ("olmo2", _LLAMA),
    "starcoder2": ("starcoder2", _LLAMA),
    "phi": ("phi", _LLAMA),
    "phi3": ("phi3", _LLAMA),
    "opt": ("opt", _OPT),
    "opt-after": ("opt", _OPT | {"do_layer_norm_before": False}),
    "opt-gelu": ("opt", _OPT | {"activation_function": "gelu"}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}),
    "gpt_neox": ("gpt_neox", _LLAMA | {"num_key_value_heads": 4}),
    "gpt_neox-serial": ("gpt_neox", _LLAMA | {"num_key_value_heads": 4, "use_parallel_residual": False}),
    "mixtral": ("mixtral", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        _MOE | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    ),
    "qwen3_moe": ("qwen3_moe", _MOE | {"head_dim": 8, "mlp_only_layers": [1], "decoder_sparse_step": 1}),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {
            "text_config": _LLAMA
            | {"intermediate_size": 64, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "vision_config": _VISION,
            "image_token_id": IMAGE_TOKEN,
            "vision_start_token_id": 91,
            "vision_end_token_id": 92,
            "video_token_id": 93,
            "tie_word_embeddings": False,
        },
    ),
}
"""Name -> (model_type, fields of its config)."""

TOKENS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(5))


def family_model(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """Return a random model of a family in evaluation mode; the weights depend on the seed alone."""
    model_type, fields = CONFIGS[name]
    config = transformers.AutoConfig.for_model(model_type, **(fields | changes))
    is_visual = model_type == "qwen2_5_vl"
    loader: Any = transformers.AutoModelForImageTextToText if is_visual else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    options = {"attn_implementation": "eager"}
    if "num_experts_per_tok" in fields:  # the grouped kernel of torch has no float64
        options["experts_implementation"] = "eager"
    model = loader.from_config(config, **options).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim < 2 else 0.15)
            parameter.copy_((noise + (1.0 if parameter.ndim < 2 else 0.0)).to(dtype))
    return model.eval()


def image_inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return the inputs of one image of 8x8 patches (16 merged tokens) with some text, for the vision family."""
    generator = torch.Generator().manual_seed(6)
    pixels = torch.randn(64, 3 * 2 * 4 * 4, generator=generator).to(dtype)
    tokens = torch.cat([torch.tensor([91]), torch.full((16,), IMAGE_TOKEN), torch.tensor([92]), TOKENS[0, :6]])[None]
    return {
        "input_ids": tokens,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (tokens == IMAGE_TOKEN).to(torch.int64),
    }


def run(model: Any, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """Return the logits of a model; the vision family gets an image."""
    if inputs is None:
        is_visual = model.config.model_type == "qwen2_5_vl"
        inputs = image_inputs(model.dtype) if is_visual else {"input_ids": TOKENS}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits
