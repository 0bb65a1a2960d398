"""Names of GGUF tensors in a transformers model, with what llama.cpp's converter did to their rows.

The table covers the architectures whose decoder layers are alike (llama with mistral and mixtral, qwen2, qwen3, their
mixtures of experts, and gpt-oss). Names of the Hugging Face side are those of transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from microscale.checkpoint.gguf_header import GgufEntry, GgufHeader
from microscale.errors import CheckpointError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gpt-oss")
"""Values of ``general.architecture`` that we read."""


class WeightKind(Enum):
    """What a weight belongs to; the values are those of ``LayerSpec.kind``."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    EXPERTS = "experts"


class RowOrder(Enum):
    """How the rows of a transformers tensor come out of the rows of its GGUF tensors."""

    AS_STORED = "as stored"
    ROTARY_PAIRS = "rotary pairs"
    """Each head's rows stand as 0, half, 1, half + 1, ... in the file."""
    CONCATENATED = "concatenated"
    """Two tensors of experts, one after the other."""
    ALTERNATING = "alternating"
    """Two tensors of experts, row by row in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor of a transformers model and the tensors of the file that it is made of.

    ``kind`` is None where the tensor is no weight that can stay quantized (norms, biases, routers). ``stored_shape``
    is [..., rows, cols] as quantized weights keep it; the float parameter has its ``axes`` in that order (transformers
    keeps the experts of gpt-oss as [experts, cols, rows]). ``num_heads`` belongs to ``ROTARY_PAIRS``.
    """

    name: str
    entries: tuple[GgufEntry, ...]
    kind: WeightKind | None
    stored_shape: tuple[int, ...]
    axes: tuple[int, ...]
    order: RowOrder = RowOrder.AS_STORED
    num_heads: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the float parameter."""
        return tuple(self.stored_shape[axis] for axis in self.axes)

    def arrange(self, parts: Sequence[Tensor]) -> Tensor:
        """Join and reorder the rows of the file's tensors; whole rows move, so packed rows do as well as floats."""
        match self.order:
            case RowOrder.AS_STORED:
                return parts[0]
            case RowOrder.ROTARY_PAIRS:
                assert self.num_heads is not None
                heads = parts[0].unflatten(0, (self.num_heads, -1, 2))
                return heads.transpose(1, 2).flatten(0, 2)
            case RowOrder.CONCATENATED:
                return torch.cat(list(parts), dim=1)
            case RowOrder.ALTERNATING:
                return torch.stack(list(parts), dim=2).flatten(1, 2)


_TOP: Mapping[str, tuple[str, WeightKind | None]] = MappingProxyType(
    {
        "token_embd": ("model.embed_tokens", WeightKind.EMBEDDING),
        "output_norm": ("model.norm", None),
        "output": ("lm_head", WeightKind.LINEAR),
    }
)
_BLOCK: Mapping[str, tuple[str, WeightKind | None]] = MappingProxyType(
    {
        "attn_norm": ("input_layernorm", None),
        "attn_q": ("self_attn.q_proj", WeightKind.LINEAR),
        "attn_k": ("self_attn.k_proj", WeightKind.LINEAR),
        "attn_v": ("self_attn.v_proj", WeightKind.LINEAR),
        "attn_output": ("self_attn.o_proj", WeightKind.LINEAR),
        "attn_q_norm": ("self_attn.q_norm", None),
        "attn_k_norm": ("self_attn.k_norm", None),
        "ffn_norm": ("post_attention_layernorm", None),
        "ffn_gate": ("mlp.gate_proj", WeightKind.LINEAR),
        "ffn_up": ("mlp.up_proj", WeightKind.LINEAR),
        "ffn_down": ("mlp.down_proj", WeightKind.LINEAR),
        "ffn_gate_inp": ("mlp.gate", None),
        "ffn_down_exps": ("mlp.experts.down_proj", WeightKind.EXPERTS),
        "ffn_gate_inp_shexp": ("mlp.shared_expert_gate", None),
        "ffn_gate_shexp": ("mlp.shared_expert.gate_proj", WeightKind.LINEAR),
        "ffn_up_shexp": ("mlp.shared_expert.up_proj", WeightKind.LINEAR),
        "ffn_down_shexp": ("mlp.shared_expert.down_proj", WeightKind.LINEAR),
    }
)
_GPT_OSS_BLOCK: Mapping[str, tuple[str, WeightKind | None]] = MappingProxyType(
    {
        **_BLOCK,
        "ffn_gate_inp": ("mlp.router", None),
        "post_attention_norm": ("post_attention_layernorm", None),
        "attn_sinks": ("self_attn.sinks", None),
    }
)
_GATE, _UP, _FUSED = "ffn_gate_exps", "ffn_up_exps", "mlp.experts.gate_up_proj"
_NO_SUFFIX = frozenset({"self_attn.sinks"})
_COMPUTED = frozenset({"rope_freqs.weight"})
_NAME = re.compile(r"(?:blk\.(\d+)\.)?([a-z0-9_]+)\.(weight|bias)$")


def place_tensors(path: Path, architecture: str, header: GgufHeader) -> tuple[list[GgufTensor], tuple[str, ...]]:
    """Return every tensor of the transformers model, and the names of the tensors that it has no use for.

    Raises:
        CheckpointError: a tensor that has no place in this architecture, or half a pair of experts.
    """
    placed: dict[str, GgufTensor] = {}
    ignored: list[str] = []
    num_joined = 0
    for name, entry in header.entries.items():
        if name in _COMPUTED:
            ignored.append(name)
            continue
        match = _NAME.match(name)
        tensor = None
        if match is not None and match[2] in (_GATE, _UP) and match[1] is not None:
            if match[2] == _UP and name.replace(_UP, _GATE) in header.entries:
                num_joined += 1  # placed together with its gate
                continue
            tensor = _place_pair(path, architecture, name, match, header)
        elif match is not None:
            tensor = _place_one(path, architecture, entry, match, header)
        if tensor is None:
            raise CheckpointError(f"{path}: tensor {name!r} has no place in a model of architecture {architecture}")
        placed[tensor.name] = tensor
    if len(placed) + num_joined + len(ignored) != len(header.entries):
        raise CheckpointError(f"{path}: two tensors stand for the same weight of the model; the file is damaged")
    return list(placed.values()), tuple(ignored)


def _place_one(
    path: Path, architecture: str, entry: GgufEntry, match: re.Match[str], header: GgufHeader
) -> GgufTensor | None:
    block_idx, stem, suffix = match.groups()
    table = _TOP if block_idx is None else _GPT_OSS_BLOCK if architecture == "gpt-oss" else _BLOCK
    if stem not in table:
        return None
    target, kind = table[stem]
    num_heads = None
    if architecture == "llama" and block_idx is not None and stem in ("attn_q", "attn_k"):
        num_heads = _head_count(path, header, "head_count" if stem == "attn_q" else "head_count_kv", int(block_idx))
        if entry.shape[0] % (2 * num_heads):
            raise CheckpointError(
                f"{path}: {entry.name!r} has {entry.shape[0]} rows, which {num_heads} heads cannot share"
            )
    shape = entry.shape
    if stem == "ffn_gate_inp_shexp" and len(shape) == 1:
        shape = (1, *shape)
    rank = 3 if kind is WeightKind.EXPERTS else 2
    if suffix == "weight" and kind is not None and len(shape) != rank:
        raise CheckpointError(f"{path}: {entry.name!r} must have {rank} dimensions, got the shape {list(shape)}")
    return GgufTensor(
        name=_full_name(target, block_idx, suffix, kind),
        entries=(entry,),
        kind=kind if suffix == "weight" else None,
        stored_shape=shape,
        axes=_axes(architecture, kind, shape),
        order=RowOrder.AS_STORED if num_heads is None else RowOrder.ROTARY_PAIRS,
        num_heads=num_heads,
    )


def _place_pair(path: Path, architecture: str, name: str, match: re.Match[str], header: GgufHeader) -> GgufTensor:
    gate, up = (header.entries.get(name.replace(match[2], stem)) for stem in (_GATE, _UP))
    rank = 3 if match[3] == "weight" else 2
    if gate is None or up is None or gate.shape != up.shape or len(gate.shape) != rank:
        found = [None if entry is None else list(entry.shape) for entry in (gate, up)]
        raise CheckpointError(f"{path}: {name!r}: gate and up experts must come as a pair of one shape, got {found}")
    shape = (gate.shape[0], 2 * gate.shape[1], *gate.shape[2:])
    return GgufTensor(
        name=_full_name(_FUSED, match[1], match[3], WeightKind.EXPERTS),
        entries=(gate, up),
        kind=WeightKind.EXPERTS if match[3] == "weight" else None,
        stored_shape=shape,
        axes=_axes(architecture, WeightKind.EXPERTS, shape),
        order=RowOrder.ALTERNATING if architecture == "gpt-oss" else RowOrder.CONCATENATED,
    )


def _full_name(target: str, block_idx: str | None, suffix: str, kind: WeightKind | None) -> str:
    """Return the parameter's name: experts and sinks are parameters themselves, all others weights of a module."""
    prefix = "" if block_idx is None else f"model.layers.{int(block_idx)}."
    if kind is WeightKind.EXPERTS:
        return f"{prefix}{target}" if suffix == "weight" else f"{prefix}{target}_bias"
    return f"{prefix}{target}" if target in _NO_SUFFIX else f"{prefix}{target}.{suffix}"


def _axes(architecture: str, kind: WeightKind | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    if architecture == "gpt-oss" and kind is WeightKind.EXPERTS and len(shape) == 3:
        return (0, 2, 1)
    return tuple(range(len(shape)))


def _head_count(path: Path, header: GgufHeader, key: str, block_idx: int) -> int:
    """Return the number of heads of a block: one number for the model, or a list with one for each block."""
    value = header.metadata.get(f"llama.attention.{key}", header.metadata.get("llama.attention.head_count"))
    if isinstance(value, list):
        value = value[block_idx] if block_idx < len(value) else None
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: llama.attention.{key} must be a positive number, got {value!r}")
    return value
