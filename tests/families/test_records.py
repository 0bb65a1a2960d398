"""Records of families against each other and against hand-written tables; against real models: test_look_up.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from microscale.families.decoders import DECODER_FAMILIES
from microscale.families.records import (
    FAMILIES,
    GroupRecord,
    TowerRecord,
    ValueRows,
    always,
    attention_groups,
    expert_tower,
    gated_groups,
    gated_tower,
    no_obstacle,
)
from microscale.families.structure import FoldKind, NormKind, Signs

LLAMA = DECODER_FAMILIES["llama"]
TOWERS = {
    f"{family}.{part}": tower
    for family, record in FAMILIES.items()
    for part, tower in (("language", record.language), ("vision", record.vision))
    if tower is not None
}


def roles(groups: tuple[GroupRecord, ...]) -> dict[str, tuple[str, ...]]:
    """Return the linears of each role."""
    return {group.role: group.linears for group in groups}


def test_the_groups_of_a_plain_decoder() -> None:
    tower = gated_tower(LLAMA)
    assert tower.groups == (*attention_groups(LLAMA), *gated_groups(LLAMA))
    assert roles(tower.groups) == {
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.out": ("self_attn.o_proj",),
        "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down": ("mlp.down_proj",),
    }
    folds = {group.role: (group.fold.kind, group.fold.name) for group in tower.groups if group.fold is not None}
    assert folds == {
        "attention.qkv": (FoldKind.NORM, "input_layernorm"),
        "attention.out": (FoldKind.VALUE, "self_attn.v_proj"),
        "mlp.gate_up": (FoldKind.NORM, "post_attention_layernorm"),
        "mlp.down": (FoldKind.LINEAR, "mlp.up_proj"),
    }
    assert (tower.layers, tower.final_norm, tower.head) == ("model.layers", "model.norm", "lm_head")
    assert tower.entries == ("model.embed_tokens.weight",) and tower.norm is NormKind.RMS


@pytest.mark.parametrize("name", TOWERS)
def test_no_linear_is_named_twice(name: str) -> None:
    named = [linear for group in TOWERS[name].groups for linear in group.linears]
    assert len(named) == len(set(named)) >= 4


@pytest.mark.parametrize("name", TOWERS)
def test_what_a_group_reads_stands_before_it(name: str) -> None:
    """Sources and linears that take a scale are linears of an earlier group."""
    before: set[str] = set()
    for group in TOWERS[name].groups:
        assert set(group.sources) <= before
        if group.fold is not None and group.fold.kind is not FoldKind.NORM:
            assert group.fold.name in before and group.fold.name not in group.linears
        before |= set(group.linears)


@pytest.mark.parametrize("name", TOWERS)
def test_roles_that_write_into_the_stream(name: str) -> None:
    groups = TOWERS[name].groups
    found = [group.role for group in groups]
    assert len(found) == len(set(found)) and found[0] == "attention.qkv"
    assert {"attention.out", "mlp.down"} <= set(found)
    for group in groups:
        if group.role.endswith((".out", ".down")):
            assert len(group.linears) == 1 and (group.fold is None or group.fold.kind is not FoldKind.NORM)


def test_experts_come_beside_the_dense_layers() -> None:
    tower = expert_tower(LLAMA)
    assert tower.groups[:4] == gated_tower(LLAMA).groups and tower.stack_writers == ("mlp.experts.down_proj",)
    experts = roles(tower.groups[4:])
    assert experts == {
        "moe.experts.gate_up": ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        "moe.experts.down": ("mlp.experts.*.down_proj",),
    }
    fold = tower.groups[4].fold
    assert fold is not None and fold.others == ("mlp.gate.weight", "mlp.experts.gate_up_proj"), (
        "the router reads it too"
    )


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", NormKind.RMS),
        ("gemma", NormKind.RMS_PLUS_ONE),
        ("gemma2", NormKind.RMS_PLUS_ONE),
        ("gemma3", NormKind.RMS_PLUS_ONE),
        ("stablelm", NormKind.LAYER),
        ("starcoder2", NormKind.LAYER),
        ("opt", NormKind.LAYER),
        ("qwen2_5_vl", NormKind.RMS),
    ],
)
def test_kinds_of_norms(family: str, kind: NormKind) -> None:
    assert FAMILIES[family].language.norm is kind


def opt(**changes: Any) -> SimpleNamespace:
    """Return the fields of OPT's config that its record asks for."""
    fields: dict[str, Any] = {"do_layer_norm_before": True, "word_embed_proj_dim": 32, "hidden_size": 32}
    return SimpleNamespace(**{**fields, "activation_function": "relu", **changes})


@pytest.mark.parametrize(
    ("changes", "holding", "obstacle"),
    [
        ({}, ["attention.qkv", "attention.out", "mlp.up", "mlp.down"], None),
        ({"activation_function": "gelu"}, ["attention.qkv", "attention.out", "mlp.up"], None),
        ({"do_layer_norm_before": False}, ["attention.out", "mlp.down"], "its norms stand in the residual stream"),
        (
            {"word_embed_proj_dim": 16},
            ["attention.qkv", "attention.out", "mlp.up", "mlp.down"],
            "linear layers stand between the embeddings and the residual stream",
        ),
    ],
)
def test_opt_asks_its_config(changes: dict[str, Any], holding: list[str], obstacle: str | None) -> None:
    tower, config = FAMILIES["opt"].language, opt(**changes)
    assert [group.role for group in tower.groups if group.fold is not None and group.fold.holds(config)] == holding
    found = tower.obstacle(config)
    assert found is None if obstacle is None else str(found).startswith(obstacle)


def test_a_scale_before_a_relu_is_positive() -> None:
    signed = {
        name: [group.role for group in tower.groups if group.fold is not None and group.fold.signs is Signs.POSITIVE]
        for name, tower in TOWERS.items()
    }
    assert {name: found for name, found in signed.items() if found} == {"opt.language": ["mlp.down"]}


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma3", "olmo2"])
def test_norms_behind_a_layer_hinder_a_rotation(family: str) -> None:
    assert "each layer norms what it adds" in str(FAMILIES[family].language.obstacle(None))
    assert FAMILIES["llama"].language.obstacle is no_obstacle and no_obstacle(None) is None and always(None)


def test_values_by_head_are_those_of_gpt_neox_alone() -> None:
    by_head = [
        name
        for name, tower in TOWERS.items()
        if any(group.fold is not None and group.fold.value_rows is ValueRows.PER_HEAD for group in tower.groups)
    ]
    assert by_head == ["gpt_neox.language"]


def test_olmo2_has_no_norm_before_its_layers() -> None:
    def kinds(tower: TowerRecord) -> list[FoldKind | None]:
        return [group.fold.kind if group.fold is not None else None for group in tower.groups]

    assert kinds(FAMILIES["olmo2"].language) == [None, FoldKind.VALUE, None, FoldKind.LINEAR]
    assert roles(FAMILIES["olmo2"].language.groups) == roles(FAMILIES["llama"].language.groups)


def test_parts_of_models_with_vision() -> None:
    with_vision = {name: record for name, record in FAMILIES.items() if record.vision is not None}
    assert list(with_vision) == ["qwen2_5_vl"]
    vision = with_vision["qwen2_5_vl"].vision
    assert vision is not None and vision.config == "vision_config" and "merger" in str(vision.obstacle(None))
    assert FAMILIES["gemma3"].language.config == FAMILIES["qwen2_5_vl"].language.config == "text_config"
    assert FAMILIES["gemma3"].language.layers == "model.language_model.layers"
