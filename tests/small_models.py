"""Models for the tests: tiny random ones of several families, and two layers of the model that ships with the project.

Every function writes a Hugging Face directory and returns its path; the weights depend on the seed alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

REPO_ROOT = Path(__file__).resolve().parents[1]
LLAMA_6M = REPO_ROOT / "examples" / "models" / "llama-6m"

VOCABULARY = 272
"""256 bytes, <s>, </s> and some tokens that no text uses."""
BOS, EOS = 256, 257
POSITIONS = 128

transformers.utils.logging.disable_progress_bar()


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token for each byte, <s> and </s>; it adds no special token by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    assert (fast.bos_token_id, fast.eos_token_id) == (BOS, EOS)
    return fast


_SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS},
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "word_embed_proj_dim": 64,
        "pad_token_id": 258,
    },
    "gpt_neox": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
    },
}
_SIZES["mistral"] = _SIZES["qwen2"] = _SIZES["llama"]
_SIZES["qwen3"] = _SIZES["llama"] | {"head_dim": 16}
_SIZES["gemma"] = _SIZES["llama"] | {"head_dim": 16, "pad_token_id": 258}
_SIZES["gemma3_text"] = _SIZES["gemma"] | {"query_pre_attn_scalar": 16, "sliding_window": 32}
_SIZES["mixtral"] = _SIZES["llama"] | {"num_local_experts": 4, "num_experts_per_tok": 2}
_MOE = _SIZES["llama"] | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SIZES["qwen3_moe"] = _MOE | {"head_dim": 16}
_SIZES["qwen2_moe"] = _MOE | {"shared_expert_intermediate_size": 64, "mlp_only_layers": [1]}
FAMILIES = tuple(_SIZES)


def save_random_model(
    path: Path, family: str = "llama", *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any
) -> Path:
    """Write a random causal language model of a family with its tokenizer; ``changes`` go into its config."""
    fields = _SIZES[family] | {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS} | changes
    config = transformers.AutoConfig.for_model(family, dtype=dtype, **fields)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: zeros and ones would hide a mix-up
            noise = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim < 2 else 0.1)
            parameter.copy_((noise + (1.0 if parameter.ndim < 2 else 0.0)).to(dtype))
    model.generation_config.pad_token_id = EOS
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def save_two_layers(path: Path) -> Path:
    """Write the first two layers of llama-6m: real weights, widths 256 and 704, tied embeddings."""
    path.mkdir(parents=True)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(LLAMA_6M / name, path)
    config = read_config(LLAMA_6M) | {"num_hidden_layers": 2}
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(LLAMA_6M / "model.safetensors")
    late = tuple(f"model.layers.{layer}." for layer in range(2, 6))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(late)}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return path


def read_config(path: Path) -> dict[str, Any]:
    """Return the content of config.json."""
    return json.loads((path / "config.json").read_text("utf-8"))


def edit_config(path: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    config = read_config(path) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a directory, of one file or of several."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def edit_tensors(path: Path, **changes: Tensor | None) -> None:
    """Change tensors of model.safetensors; names with __ for dots, None removes one."""
    tensors: dict[str, Tensor | None] = {**read_tensors(path)}
    tensors.update({name.replace("__", "."): value for name, value in changes.items()})
    kept = {name: value.contiguous() for name, value in tensors.items() if value is not None}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(7))


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """Return the logits of a model on fixed tokens."""
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bytes (so NaN equals NaN, 0 differs from -0)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool((one.contiguous().view(torch.uint8) == other.contiguous().view(torch.uint8)).all())


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that differ, or stand in one of two only."""
    return [
        name for name in {*one, *other} if name not in one or name not in other or not same_bits(one[name], other[name])
    ]
