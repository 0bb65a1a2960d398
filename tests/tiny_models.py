"""Tiny random models of nearly any architecture of transformers.

A config has a few dozen fields; those that are sizes have much the same names in all families. Whatever is not listed
here keeps its default. Families that need more have a line in ``MORE``.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from microscale.families.batch import Batch
from microscale.families.running import run_model

WIDTH, INNER, LAYERS, HEADS, HEAD_DIM, VOCABULARY, EXPERTS, POSITIONS = 64, 96, 2, 4, 16, 160, 4, 256

NAMES: dict[int, str] = {
    WIDTH: (
        "hidden_size n_embd d_model dim embed_dim word_embed_proj_dim width attention_hidden_size "
        "lru_width hidden_dim out_hidden_size attention_value_size"
    ),
    INNER: (
        "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size intermediate_size_mlp "
        "decoder_ffn_dim encoder_ffn_dim dense_intermediate_size block_ff_dim"
    ),
    2: (
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth "
        "num_blocks num_decoder_layers num_key_value_heads num_kv_heads linear_num_key_heads "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts n_group "
        "mamba_expand spatial_merge_size temporal_patch_size eos_token_id index_n_heads"
    ),
    4: (
        "num_attention_heads n_head n_heads encoder_attention_heads num_heads "
        "decoder_attention_heads linear_num_value_heads num_experts num_local_experts "
        "n_routed_experts moe_num_experts"
    ),
    HEAD_DIM: (
        "head_dim kv_channels global_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim "
        "linear_key_head_dim linear_value_head_dim rotary_dim attention_head_dim "
        "query_pre_attn_scalar d_kv mamba_d_head index_head_dim mamba_d_state mamba_chunk_size "
        "state_size hidden_size_per_layer_input num_mel_bins"
    ),
    VOCABULARY: "vocab_size vocab_size_per_layer_input pooling_vocab_size",
    32: (
        "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
        "moe_shared_expert_intermediate_size shared_intermediate_size expert_dim q_lora_rank "
        "kv_lora_rank time_step_rank mamba_dt_rank augmented_loss_rank image_size"
    ),
    POSITIONS: "max_position_embeddings n_positions max_source_positions max_target_positions",
    1: (
        "topk_group num_expert_group first_k_dense_replace num_dense_layers n_shared_experts "
        "mamba_n_groups bos_token_id"
    ),
    8: "mamba_n_heads patch_size index_topk",
    128: "mamba_d_ssm",
    0: "num_nextn_predict_layers pad_token_id",
    150: "image_token_id image_token_index",
    151: "video_token_id",
    152: "vision_start_token_id",
    153: "vision_end_token_id",
    154: "audio_token_id",
}
SIZES: dict[str, Any] = {name: value for value, names in NAMES.items() for name in names.split()}
"""Field of a config -> its value in a tiny model."""

ALL_HEADS = {"num_key_value_heads": HEADS}
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2}
MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dots3_note_text": ALL_HEADS,
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gemma3n_text": SHARED | {"activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [INNER] * 4},
    "glm5_next": ALL_HEADS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": HEAD_DIM, "n_groups": 1, "chunk_size": 16},
    "step3p7": {"sliding_window": 16},
    "zamba": {"attention_head_dim": 32},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beside, or otherwise."""

THREE_AXES = {
    f"{family}_text"
    for family in ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_omni")
}
"""Families whose rotary positions have three axes, though their default config says nothing of it."""


def field_names(kind: type) -> set[str]:
    """Return the fields of a config class."""
    names = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    return names | set(inspect.signature(kind.__init__).parameters)


def tiny_config(family: str, **changes: Any) -> Any:
    """Return a config of a family (its ``model_type``) with small sizes, sub-configs included."""
    kind: Any = CONFIG_MAPPING[family]
    names = field_names(kind)
    default: Any = kind()
    entries: dict[str, Any] = {
        name: value
        for name, value in SIZES.items()
        if name in names and not isinstance(vars(default).get(name), list | tuple)
    }
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        entries["num_key_value_heads"] = HEADS
    rope = vars(default).get("rope_parameters")
    if family in THREE_AXES or (isinstance(rope, dict) and "mrope_section" in rope):
        entries["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4} | (rope or {})
        entries["rope_parameters"]["mrope_section"] = _sections(entries["rope_parameters"])
    for name in getattr(kind, "sub_configs", {}):
        inner = vars(default).get(name)
        inner_family = str(getattr(inner, "model_type", ""))
        if inner_family in CONFIG_MAPPING:
            entries[name] = tiny_config(inner_family).to_dict()
    layers = entries.get("num_hidden_layers", LAYERS)
    for name in names & {"layer_types", "layers_block_type", "mlp_layer_types"}:
        kinds = vars(default).get(name)
        if isinstance(kinds, list) and kinds:
            entries[name] = (list(dict.fromkeys(kinds)) * layers)[:layers]
    return kind(**(entries | MORE.get(family, {}) | changes))


def _sections(rope: dict[str, Any]) -> list[int]:
    """Share the rotated half of a head among time, height and width."""
    half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
    return [half - 2 * (half // 3), half // 3, half // 3]


def model_class(config: Any) -> Any:
    """Return the class that generates text from a config, of text or of images and text."""
    order = ["AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel"]
    for name in reversed(order[:2]) if "vision_config" in config.sub_configs else order:
        mapping: Any = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise KeyError(type(config).__name__)


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a random model of a family; norms, biases and other vectors are random too, so that a mix-up shows."""
    torch.manual_seed(0)
    config = tiny_config(family, **changes)
    model = model_class(config)(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and "A_log" not in name and "dt_bias" not in name:
            parameter.data += 0.1 * noise
    return model.to(dtype)


def save_tiny(family: str, path: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a tiny model as a directory."""
    tiny_model(family, dtype=dtype, **changes).save_pretrained(path)
    return path


TOKENS = torch.arange(3, 35)[None]


def logits(model: Any) -> Tensor:
    """Return what a model makes of a text."""
    with torch.no_grad():
        return run_model(model, Batch(token_ids=TOKENS)).logits


def add_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Put more tensors into the file of a model."""
    file = directory / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})
