"""One record for each family: the names of its layers, what reads what, and where a scale can go.

A record lists every group that a block of the family may have; :mod:`microscale.families.look_up` takes those that the
block at hand has. ``*`` in a name stands for the number of an expert.

Source: the modelling files of transformers 5 for each ``model_type``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from microscale.families.batch import Runner
from microscale.families.decoders import DECODER_FAMILIES, DecoderFamily
from microscale.families.structure import FoldKind, NormKind, Signs


class ValueRows(Enum):
    """Where the rows of the values lie in the projection that makes them.

    LAST: they are its last rows (its only ones, or behind queries and keys). PER_HEAD: each head has its query, key and
    value rows together.
    """

    LAST = "last"
    PER_HEAD = "per_head"


def always(config: Any) -> bool:
    """Whether a fold holds: with any config."""
    return True


def no_obstacle(config: Any) -> str | None:
    """Return why the residual stream cannot be rotated: nothing hinders."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldRecord:
    """A fold of a family: ``others`` are matrices beside the linears that read a norm; ``holds`` asks the config."""

    kind: FoldKind
    name: str
    others: tuple[str, ...] = ()
    value_rows: ValueRows = ValueRows.LAST
    signs: Signs = Signs.ANY
    holds: Callable[[Any], bool] = always


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRecord:
    """A group that blocks of a family may have; ``sources`` as in :class:`LinearGroup`."""

    role: str
    linears: tuple[str, ...]
    fold: FoldRecord | None = None
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerRecord:
    """One stack of layers: ``config`` names its part of the model's config, ``stack_writers`` its stacked experts."""

    layers: str
    groups: tuple[GroupRecord, ...]
    norm: NormKind
    embeddings: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()
    final_norm: str | None = None
    head: str | None = None
    config: str = ""
    stack_writers: tuple[str, ...] = ()
    obstacle: Callable[[Any], str | None] = no_obstacle


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyRecord:
    """The towers of a family, and what calls its models on a batch (None: as their structure asks for)."""

    language: TowerRecord
    vision: TowerRecord | None = None
    runner: Runner | None = None


def norm(name: str, *others: str, holds: Callable[[Any], bool] = always) -> FoldRecord:
    """A scale that goes into a norm."""
    return FoldRecord(kind=FoldKind.NORM, name=name, others=others, holds=holds)


def value(name: str, rows: ValueRows = ValueRows.LAST) -> FoldRecord:
    """A scale that goes into the rows of a value projection."""
    return FoldRecord(kind=FoldKind.VALUE, name=name, value_rows=rows)


def product(name: str) -> FoldRecord:
    """A scale that goes into the last rows of a linear layer whose output is a factor of the group's input."""
    return FoldRecord(kind=FoldKind.LINEAR, name=name)


def group(role: str, *linears: str, fold: FoldRecord | None = None, sources: tuple[str, ...] = ()) -> GroupRecord:
    """A group of linear layers."""
    return GroupRecord(role=role, linears=linears, fold=fold, sources=sources)


def attention_groups(names: DecoderFamily) -> tuple[GroupRecord, ...]:
    """The groups of attention with separate projections."""
    return (
        group("attention.qkv", names.query, names.key, names.value, fold=norm(names.input_norm)),
        group("attention.out", names.output, fold=value(names.value)),
    )


def gated_groups(names: DecoderFamily) -> tuple[GroupRecord, ...]:
    """The groups of a gated feed-forward layer."""
    return (
        group("mlp.gate_up", names.gate, names.up, fold=norm(names.mlp_norm)),
        group("mlp.down", names.down, fold=product(names.up), sources=(names.gate, names.up)),
    )


def gated_tower(names: DecoderFamily, kind: NormKind = NormKind.RMS) -> TowerRecord:
    """The tower of a decoder with separate projections and a gated feed-forward layer."""
    return TowerRecord(
        layers=names.layers,
        groups=(*attention_groups(names), *gated_groups(names)),
        norm=kind,
        embeddings=(names.embedding,),
        entries=(f"{names.embedding}.weight",),
        final_norm=names.final_norm,
        head=names.head,
    )


def has_norms_after(config: Any) -> str | None:
    """Return why Gemma 2 and 3 and OLMo 2 cannot be rotated."""
    return "each layer norms what it adds to the residual stream, and the weights of these norms belong to channels"


def expert_tower(names: DecoderFamily, *shared: GroupRecord) -> TowerRecord:
    """The tower of a decoder whose feed-forward layers may be experts behind a router."""
    routed = norm(names.mlp_norm, "mlp.gate.weight", "mlp.experts.gate_up_proj")
    experts = (
        group("moe.experts.gate_up", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", fold=routed),
        group(
            "moe.experts.down",
            "mlp.experts.*.down_proj",
            fold=product("mlp.experts.*.up_proj"),
            sources=("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        ),
    )
    dense = gated_tower(names)
    return replace(dense, groups=(*dense.groups, *shared, *experts), stack_writers=("mlp.experts.down_proj",))


_PLAIN = DECODER_FAMILIES["llama"]

_GEMMA2 = replace(
    gated_tower(replace(_PLAIN, mlp_norm="pre_feedforward_layernorm"), NormKind.RMS_PLUS_ONE), obstacle=has_norms_after
)

_PHI3 = replace(
    gated_tower(_PLAIN),
    groups=(
        group("attention.qkv", "self_attn.qkv_proj", fold=norm(_PLAIN.input_norm)),
        group("attention.out", "self_attn.o_proj", fold=value("self_attn.qkv_proj")),
        group("mlp.gate_up", "mlp.gate_up_proj", fold=norm(_PLAIN.mlp_norm)),
        group("mlp.down", "mlp.down_proj", fold=product("mlp.gate_up_proj"), sources=("mlp.gate_up_proj",)),
    ),
)

_QWEN2_MOE = expert_tower(
    _PLAIN,
    group(
        "moe.shared.gate_up",
        "mlp.shared_expert.gate_proj",
        "mlp.shared_expert.up_proj",
        "mlp.shared_expert_gate",
        fold=norm(_PLAIN.mlp_norm),
    ),
    group(
        "moe.shared.down",
        "mlp.shared_expert.down_proj",
        fold=product("mlp.shared_expert.up_proj"),
        sources=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    ),
)


def _norms_before(config: Any) -> bool:
    """Whether OPT norms the inputs of its sub-layers; the 350m model norms what has been added."""
    return bool(config.do_layer_norm_before)


def _opt_obstacle(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "its norms stand in the residual stream (do_layer_norm_before is false)"
    if config.word_embed_proj_dim != config.hidden_size:
        return "linear layers stand between the embeddings and the residual stream (word_embed_proj_dim)"
    return None


_OLMO2 = replace(
    gated_tower(_PLAIN),
    groups=tuple(
        replace(each, fold=None) if each.fold is not None and each.fold.kind is FoldKind.NORM else each
        for each in gated_tower(_PLAIN).groups
    ),
    obstacle=has_norms_after,
)

_STARCODER2 = replace(
    gated_tower(_PLAIN, NormKind.LAYER),
    groups=(
        *attention_groups(_PLAIN),
        group("mlp.up", "mlp.c_fc", fold=norm(_PLAIN.mlp_norm)),
        group("mlp.down", "mlp.c_proj", sources=("mlp.c_fc",)),
    ),
)

_PHI = replace(
    gated_tower(replace(_PLAIN, final_norm="model.final_layernorm"), NormKind.LAYER),
    groups=(  # both sub-layers read one norm
        group("attention.qkv", _PLAIN.query, _PLAIN.key, _PLAIN.value, "mlp.fc1", fold=norm(_PLAIN.input_norm)),
        group("attention.out", "self_attn.dense", fold=value(_PLAIN.value)),
        group("mlp.down", "mlp.fc2", sources=("mlp.fc1",)),
    ),
)

_OPT = TowerRecord(
    layers="model.decoder.layers",
    groups=(
        group(
            "attention.qkv",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            fold=norm("self_attn_layer_norm", holds=_norms_before),
        ),
        group("attention.out", "self_attn.out_proj", fold=value("self_attn.v_proj")),
        group("mlp.up", "fc1", fold=norm("final_layer_norm", holds=_norms_before)),
        group(
            "mlp.down",
            "fc2",
            fold=replace(
                product("fc1"), signs=Signs.POSITIVE, holds=lambda config: config.activation_function == "relu"
            ),
            sources=("fc1",),
        ),
    ),
    norm=NormKind.LAYER,
    embeddings=("model.decoder.embed_tokens",),
    entries=("model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"),
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    obstacle=_opt_obstacle,
)

_GPT2 = TowerRecord(
    layers="transformer.h",
    groups=(
        group("attention.qkv", "attn.c_attn", fold=norm("ln_1")),
        group("attention.out", "attn.c_proj", fold=value("attn.c_attn")),
        group("mlp.up", "mlp.c_fc", fold=norm("ln_2")),
        group("mlp.down", "mlp.c_proj", sources=("mlp.c_fc",)),
    ),
    norm=NormKind.LAYER,
    embeddings=("transformer.wte",),
    entries=("transformer.wte.weight", "transformer.wpe.weight"),
    final_norm="transformer.ln_f",
    head="lm_head",
)

_GPT_NEOX = TowerRecord(
    layers="gpt_neox.layers",
    groups=(
        group("attention.qkv", "attention.query_key_value", fold=norm("input_layernorm")),
        group("attention.out", "attention.dense", fold=value("attention.query_key_value", ValueRows.PER_HEAD)),
        group("mlp.up", "mlp.dense_h_to_4h", fold=norm("post_attention_layernorm")),
        group("mlp.down", "mlp.dense_4h_to_h", sources=("mlp.dense_h_to_4h",)),
    ),
    norm=NormKind.LAYER,
    embeddings=("gpt_neox.embed_in",),
    entries=("gpt_neox.embed_in.weight",),
    final_norm="gpt_neox.final_layer_norm",
    head="lm_head",
)

_BESIDE_VISION = replace(
    _PLAIN,
    embedding="model.language_model.embed_tokens",
    layers="model.language_model.layers",
    final_norm="model.language_model.norm",
)

_GEMMA3 = replace(
    gated_tower(replace(_BESIDE_VISION, mlp_norm="pre_feedforward_layernorm"), NormKind.RMS_PLUS_ONE),
    config="text_config",
    obstacle=has_norms_after,
)

_QWEN2_5_VL = FamilyRecord(
    language=replace(
        gated_tower(_BESIDE_VISION),
        entries=("model.language_model.embed_tokens.weight", "model.visual.merger.mlp.2.weight"),
        config="text_config",
    ),
    vision=TowerRecord(
        layers="model.visual.blocks",
        groups=(
            group("attention.qkv", "attn.qkv", fold=norm("norm1")),
            group("attention.out", "attn.proj", fold=value("attn.qkv")),
            group("mlp.gate_up", "mlp.gate_proj", "mlp.up_proj", fold=norm("norm2")),
            group("mlp.down", "mlp.down_proj", fold=product("mlp.up_proj"), sources=("mlp.gate_proj", "mlp.up_proj")),
        ),
        norm=NormKind.RMS,
        final_norm="model.visual.merger.ln_q",
        config="vision_config",
        obstacle=lambda config: "its merger reads several vectors of the residual stream at once",
    ),
)

FAMILIES: dict[str, FamilyRecord] = {
    **{name: FamilyRecord(language=gated_tower(names)) for name, names in DECODER_FAMILIES.items()},
    "gemma": FamilyRecord(language=gated_tower(_PLAIN, NormKind.RMS_PLUS_ONE)),
    "gemma2": FamilyRecord(language=_GEMMA2),
    "gemma3_text": FamilyRecord(language=_GEMMA2),
    "gemma3": FamilyRecord(language=_GEMMA3),
    "smollm3": FamilyRecord(language=gated_tower(_PLAIN)),
    "granite": FamilyRecord(language=gated_tower(_PLAIN)),
    "stablelm": FamilyRecord(language=gated_tower(_PLAIN, NormKind.LAYER)),
    "olmo2": FamilyRecord(language=_OLMO2),
    "starcoder2": FamilyRecord(language=_STARCODER2),
    "phi": FamilyRecord(language=_PHI),
    "phi3": FamilyRecord(language=_PHI3),
    "opt": FamilyRecord(language=_OPT),
    "gpt2": FamilyRecord(language=_GPT2),
    "gpt_neox": FamilyRecord(language=_GPT_NEOX),
    "mixtral": FamilyRecord(language=expert_tower(_PLAIN)),
    "qwen2_moe": FamilyRecord(language=_QWEN2_MOE),
    "qwen3_moe": FamilyRecord(language=expert_tower(_PLAIN)),
    "qwen2_5_vl": _QWEN2_5_VL,
}
"""By ``model_type``."""
