"""Folds and rotations: what a model computes stays the same, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from family_models import CONFIGS, family_model, run
from microscale.errors import ModelError, NonFiniteError, ShapeError
from microscale.families.look_up import describe
from microscale.families.structure import BlockStructure, FoldKind, LinearGroup, NormKind, Signs
from microscale.nn.experts import unstack_experts
from microscale.recipes.apply import quantize_model
from microscale.recipes.folding import (
    centre_residual,
    fold_order,
    fold_scale,
    fuse_norms,
    keep_mean,
    rotate_residual,
    rotate_value,
    shared_scale,
    untie_head,
)
from microscale.recipes.matrices import matrix
from microscale.recipes.recipe import make_recipe
from small_models import TOKENS as LONG_TOKENS
from small_models import logits, save_random_model

CASES = [(name, "language") for name in CONFIGS] + [("qwen2_5_vl", "vision")]
TOLERANCE = 1e-5
"""Relative to the largest logit: transformers computes norms and attention in float32 also in float64 models."""


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthogonal(width: int, seed: int = 4) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=generator(seed), dtype=torch.float64))[0]


def check_same(model: Any, before: Tensor) -> None:
    assert float((run(model) - before).abs().max() / before.abs().max()) < TOLERANCE


def random_scale(group: LinearGroup, width: int) -> Tensor:
    assert group.fold is not None
    scale = torch.rand(width, generator=generator(), dtype=torch.float64) * 3 + 0.2
    if group.fold.signs is Signs.ANY:
        scale = scale * (torch.randint(0, 2, (width,), generator=generator()) * 2 - 1)
    return shared_scale(group.fold, scale)


def folded_groups(model: Any, part: str) -> list[tuple[BlockStructure, LinearGroup]]:
    blocks = describe(model, part).blocks
    return [(block, group) for block in blocks for group in block.groups if group.fold is not None]


def weight_of(model: Any, block: BlockStructure, linear: str) -> Tensor:
    return matrix(model, f"{block.name}.{linear}.weight")


@pytest.mark.parametrize(("name", "part"), CASES)
@pytest.mark.parametrize("kind", list(FoldKind))
def test_a_folded_scale_changes_inputs_and_weights_alone(name: str, part: str, kind: FoldKind) -> None:
    model = family_model(name)
    before = run(model)
    chosen = [pair for pair in folded_groups(model, part) if pair[1].fold and pair[1].fold.kind is kind]
    if not chosen:
        assert kind is not FoldKind.VALUE  # every family has this one
        return
    for block, group in chosen:
        weights = {linear: weight_of(model, block, linear).clone() for linear in group.linears}
        scale = random_scale(group, next(iter(weights.values())).shape[1])
        inputs_before = inputs_of(model, f"{block.name}.{group.linears[0]}")
        fold_scale(model, block, group, scale)
        for linear, weight in weights.items():
            torch.testing.assert_close(weight_of(model, block, linear), weight * scale)
        inputs_after = inputs_of(model, f"{block.name}.{group.linears[0]}")
        torch.testing.assert_close(inputs_after * scale, inputs_before, rtol=1e-5, atol=1e-5)
    check_same(model, before)


def inputs_of(model: Any, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    run(model)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("name", "part"), CASES)
def test_a_folded_order_moves_inputs_and_columns_alone(name: str, part: str) -> None:
    """Every down projection of every family takes an order of its own, experts each theirs."""
    model = family_model(name)
    unstack_experts(model)
    before = run(model)
    pairs = [(block, group) for block in describe(model, part).blocks for group in block.groups]
    chosen = [pair for pair in pairs if pair[1].sources]
    assert [pair for pair in pairs if pair[1].role.endswith(".down")] == chosen and chosen
    for index, (block, group) in enumerate(chosen):
        name_of = f"{block.name}.{group.linears[0]}"
        inputs, weight = inputs_of(model, name_of), weight_of(model, block, group.linears[0]).clone()
        order = torch.randperm(weight.shape[1], generator=generator(index))
        fold_order(model, block, group, order)
        assert torch.equal(weight_of(model, block, group.linears[0]), weight[:, order])
        torch.testing.assert_close(inputs_of(model, name_of), inputs[..., order], rtol=1e-5, atol=1e-5)
    check_same(model, before)


def test_orders_that_cannot_be() -> None:
    model = family_model("llama")
    block = describe(model).blocks[0]
    roles = {group.role: group for group in block.groups}
    for role in ("attention.qkv", "attention.out", "mlp.gate_up"):
        with pytest.raises(ModelError, match="has no sources"):
            fold_order(model, block, roles[role], torch.arange(32))
    for order in (torch.arange(47), torch.zeros(48)):
        with pytest.raises(ShapeError, match="48 inputs; an order must name each of them once"):
            fold_order(model, block, roles["mlp.down"], order)


def test_a_relu_takes_positive_scales_only() -> None:
    model = family_model("opt")
    block, group = next(pair for pair in folded_groups(model, "language") if pair[1].role == "mlp.down")
    scale = torch.ones(64)
    scale[5] = -1.0
    with pytest.raises(ModelError, match="must be positive"):
        fold_scale(model, block, group, scale)


def test_scales_that_cannot_be() -> None:
    model = family_model("llama")
    block, group = folded_groups(model, "language")[0]
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(NonFiniteError):
            fold_scale(model, block, group, torch.full((32,), bad))
    with pytest.raises(ShapeError, match="32 inputs"):
        fold_scale(model, block, group, torch.ones(31))
    values = next(pair for pair in folded_groups(model, "language") if pair[1].role == "attention.out")
    with pytest.raises(ShapeError, match="share values"):
        fold_scale(model, *values, torch.arange(1.0, 33.0))
    gpt2 = family_model("gpt2")
    lonely = next(group for group in describe(gpt2).blocks[0].groups if group.fold is None)
    with pytest.raises(ModelError, match="has no fold"):
        fold_scale(gpt2, describe(gpt2).blocks[0], lonely, torch.ones(128))


def test_shared_scale_is_a_geometric_mean() -> None:
    groups = (group for _, group in folded_groups(family_model("llama"), "language"))
    fold = next(group.fold for group in groups if group.role == "attention.out")
    assert fold is not None
    scale = torch.cat([torch.full((8,), each) for each in (1.0, 4.0, 9.0, 1.0)])
    shared = shared_scale(fold, scale)
    torch.testing.assert_close(shared, torch.cat([torch.full((16,), 2.0), torch.full((16,), 3.0)]))
    assert torch.equal(shared_scale(fold, shared), shared)


@pytest.mark.parametrize(("name", "part"), CASES)
def test_fused_norms_only_norm(name: str, part: str) -> None:
    model = family_model(name)
    before = run(model)
    structure = describe(model, part)
    fuse_norms(model, structure)
    check_same(model, before)
    rest = 0.0 if structure.norm is NormKind.RMS_PLUS_ONE else 1.0
    norms = [f"{block.name}.{norm.name}" for block in structure.blocks for norm in block.norms]
    last = [structure.final_norm] if structure.head is not None and structure.final_norm is not None else []
    assert norms or name in ("opt-after", "olmo2")
    for norm in map(model.get_submodule, norms + last):
        assert bool((norm.weight == rest).all())
    assert name == "stablelm" or not any(  # its gate and up have no biases to take those of a norm
        bool(bias.any())
        for norm in map(model.get_submodule, norms)
        if (bias := getattr(norm, "bias", None)) is not None
    )


def test_a_norm_keeps_its_bias_where_a_reader_has_none() -> None:
    model = family_model("gpt_neox", attention_bias=False)
    before = run(model)
    fuse_norms(model, describe(model))
    check_same(model, before)
    norm = model.gpt_neox.layers[0].input_layernorm
    assert bool(norm.bias.any()) and not bool(model.gpt_neox.layers[0].post_attention_layernorm.bias.any())
    model = family_model("gpt_neox", attention_bias=False)
    with torch.no_grad():
        model.gpt_neox.layers[0].input_layernorm.weight[3] = 0.0
    with pytest.raises(ModelError, match="weight of 0 beside a bias"):
        fuse_norms(model, describe(model))


ROTATABLE = [name for name in CONFIGS if name not in ("gemma2", "gemma3", "olmo2", "opt-after")]


@pytest.mark.parametrize("name", ROTATABLE)
def test_a_rotated_stream_gives_the_same_logits(name: str) -> None:
    model = family_model(name)
    before, structure = run(model), describe(model)
    stream = inputs_of(model, structure.blocks[1].name)
    q = orthogonal(32)
    rotate_residual(model, structure, q)
    check_same(model, before)
    if structure.norm is NormKind.LAYER:
        stream = stream - stream.mean(dim=-1, keepdim=True)
        q = keep_mean(q)
    torch.testing.assert_close(inputs_of(model, structure.blocks[1].name), stream @ q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("gemma2", "norms what it adds"), ("gemma3", "norms what it adds"), ("opt-after", "do_layer_norm_before")],
)
def test_families_that_cannot_be_rotated(name: str, reason: str) -> None:
    model = family_model(name)
    before = run(model)
    with pytest.raises(ModelError, match=reason):
        rotate_residual(model, describe(model), orthogonal(32))
    assert torch.equal(run(model), before)


def test_other_reasons_against_rotation() -> None:
    visual = family_model("qwen2_5_vl")
    with pytest.raises(ModelError, match="merger"):
        rotate_residual(visual, describe(visual, "vision"), orthogonal(32))
    with pytest.raises(ModelError, match="several residual streams"):
        rotate_residual(visual, describe(visual, "all"), orthogonal(32))
    model = family_model("llama")
    with pytest.raises(ShapeError, match="not orthogonal"):
        rotate_residual(model, describe(model), torch.ones(32, 32))
    with pytest.raises(ShapeError, match=r"\[32, 32\]"):
        rotate_residual(model, describe(model), orthogonal(16))
    lonely = nn.Sequential(nn.ModuleList([nn.Linear(4, 4)]))
    with pytest.raises(ModelError, match="no record"):
        rotate_residual(lonely, describe(lonely), orthogonal(4))


@pytest.mark.parametrize("name", ["opt", "opt-gelu", "gpt2", "gpt_neox", "gpt_neox-serial", "starcoder2", "phi"])
def test_a_centred_stream_has_no_mean(name: str) -> None:
    model = family_model(name)
    before, structure = run(model), describe(model)
    centre_residual(model, structure)
    check_same(model, before)
    stream = inputs_of(model, structure.blocks[1].name)
    assert float(stream.mean(dim=-1).abs().max()) < 1e-6 * float(stream.abs().max())


def test_only_layer_norms_can_be_centred() -> None:
    model = family_model("llama")
    with pytest.raises(ModelError, match="LayerNorm"):
        centre_residual(model, describe(model))


def test_keep_mean_is_orthogonal_and_keeps_it() -> None:
    for q in (orthogonal(32), torch.eye(32, dtype=torch.float64)):
        kept = keep_mean(q)
        ones = torch.ones(32, dtype=torch.float64)
        torch.testing.assert_close(kept @ ones, ones)
        torch.testing.assert_close(kept.T @ ones, ones)
        torch.testing.assert_close(kept.T @ kept, torch.eye(32, dtype=torch.float64))


@pytest.mark.parametrize(("name", "part"), CASES)
@pytest.mark.parametrize("per_head", ["one", "each"])
def test_rotated_values(name: str, part: str, per_head: str) -> None:
    model = family_model(name)
    before = run(model)
    for block in describe(model, part).blocks:
        group = next(group for group in block.groups if group.role == "attention.out")
        assert group.fold is not None and group.fold.rows is not None
        heads, width = group.fold.rows.heads, group.fold.rows.width
        q = torch.stack([orthogonal(width, seed) for seed in range(heads)])
        inputs = inputs_of(model, f"{block.name}.{group.linears[0]}")
        rotate_value(model, block, q if per_head == "each" else q[0])
        used = q if per_head == "each" else q[:1].expand_as(q)
        turned = torch.einsum("...hsi,hij->...hsj", inputs.unflatten(-1, (heads, -1, width)), used).flatten(-3)
        torch.testing.assert_close(inputs_of(model, f"{block.name}.{group.linears[0]}"), turned, rtol=1e-5, atol=1e-5)
    check_same(model, before)


def test_values_that_cannot_be_rotated() -> None:
    model = family_model("llama")
    block = describe(model).blocks[0]
    for bad in (orthogonal(7), torch.stack([orthogonal(8)] * 3), torch.ones(8, 8)):
        with pytest.raises(ShapeError):
            rotate_value(model, block, bad)
    unknown = BlockStructure(name=block.name, groups=(LinearGroup(role="unknown", linears=("self_attn.q_proj",)),))
    with pytest.raises(ModelError, match="no value path"):
        rotate_value(model, unknown, orthogonal(8))


def test_quantized_layers_are_refused() -> None:
    model = family_model("llama", dtype=torch.float32)
    block, group = folded_groups(model, "language")[0]
    structure = describe(model)
    quantize_model(model, make_recipe(format="mxfp4"))
    with pytest.raises(ModelError, match="before the layers are quantized"):
        fold_scale(model, block, group, torch.ones(32))
    with pytest.raises(ModelError, match="before the layers are quantized"):
        rotate_residual(model, structure, orthogonal(32))


@pytest.mark.parametrize("family", ["llama", "gemma", "opt", "gpt2"])
def test_an_untied_model_is_saved_and_loaded_as_it_is(tmp_path: Any, family: str) -> None:
    path = save_random_model(tmp_path / "in", family, dtype=torch.float32, tie_word_embeddings=True)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    before, structure = logits(model, LONG_TOKENS), describe(model)
    embedding = model.get_submodule(structure.embeddings[0])
    assert model.lm_head.weight is embedding.weight
    rotate_residual(model, structure, orthogonal(64))
    assert model.lm_head.weight is not embedding.weight
    model.save_pretrained(tmp_path / "out")
    after = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), LONG_TOKENS)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_untying_leaves_an_untied_head_alone() -> None:
    model = family_model("llama")
    head = model.lm_head.weight
    untie_head(model, describe(model))
    assert model.lm_head.weight is head


def test_folds_of_a_bfloat16_model_keep_its_dtypes() -> None:
    model = family_model("llama-biases-tied", dtype=torch.bfloat16)
    structure = describe(model)
    for block, group in folded_groups(model, "language"):
        fold_scale(model, block, group, random_scale(group, weight_of(model, block, group.linears[0]).shape[1]))
    rotate_residual(model, structure, orthogonal(32).to(torch.float32))
    rotate_value(model, structure.blocks[0], orthogonal(8).to(torch.float32))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
