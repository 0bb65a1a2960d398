"""Models whose experts are taken apart: the same function, and every method reaches the experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from family_models import family_model, run
from microscale.families.look_up import describe
from microscale.families.structure import FoldKind
from microscale.nn.experts import Experts, ExpertTokens, computing, stacked_experts, unstack_experts
from microscale.nn.linear import QuantizedLinear
from microscale.recipes.apply import QuantizationReport, quantize_model
from microscale.recipes.calibration import Calibration
from microscale.recipes.folding import fold_scale, fuse_norms, rotate_residual, shared_scale
from microscale.recipes.plan import make_plan
from microscale.recipes.recipe import make_recipe

FAMILIES = {"mixtral": 2, "qwen2_moe": 1, "qwen3_moe": 1}
"""Number of layers with experts."""


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_computes_the_same(name: str) -> None:
    model = family_model(name)
    before = run(model)
    replaced = unstack_experts(model)
    assert replaced == tuple(f"model.layers.{layer}.mlp.experts" for layer in range(FAMILIES[name]))
    torch.testing.assert_close(run(model), before, rtol=1e-6, atol=1e-6)
    assert unstack_experts(model) == () and stacked_experts(model) == {}


def test_some_modules_alone() -> None:
    model = family_model("mixtral")
    assert unstack_experts(model, lambda name: ".1." in name) == ("model.layers.1.mlp.experts",)
    assert list(stacked_experts(model)) == ["model.layers.0.mlp.experts"]


def test_a_model_without_experts_stays() -> None:
    model = family_model("llama")
    modules = list(model.modules())
    assert unstack_experts(model) == () and list(model.modules()) == modules


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fold_of_an_experts_input_reaches_all_that_read_it(name: str) -> None:
    model = family_model(name)
    unstack_experts(model)
    before = run(model)
    block = describe(model).blocks[0]
    experts = [group for group in block.groups if group.role == "moe.experts.gate_up"]
    assert len(experts) == 4 and len({group.fold.readers for group in experts if group.fold is not None}) == 1
    generator = torch.Generator().manual_seed(2)
    for group in block.groups:
        assert group.fold is not None
        width = model.get_submodule(f"{block.name}.{group.linears[0]}").weight.shape[1]
        scale = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
        fold_scale(model, block, group, shared_scale(group.fold, scale))
    torch.testing.assert_close(run(model), before, rtol=1e-5, atol=1e-5)
    kinds = {group.fold.kind for group in block.groups if group.fold is not None}
    assert kinds == set(FoldKind)


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_and_rotations_with_experts_apart(name: str) -> None:
    q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64))[0]
    model = family_model(name)
    unstack_experts(model)
    before = run(model)
    fuse_norms(model, describe(model))
    torch.testing.assert_close(run(model), before, rtol=1e-5, atol=1e-5)
    rotate_residual(model, describe(model), q)
    torch.testing.assert_close(run(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_are_quantized_and_routing_is_not(name: str) -> None:
    model = family_model(name, dtype=torch.float32)
    report = quantize_model(model, make_recipe(format="mxfp4"))
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, Experts)
    inner = [module for module in experts.modules() if isinstance(module, nn.Linear | QuantizedLinear)]
    assert len(inner) == 12 and all(isinstance(module, QuantizedLinear) for module in inner)
    assert not isinstance(model.model.layers[0].mlp.gate, QuantizedLinear)
    assert report.plan.unquantized == (
        ("model.layers.0.mlp.shared_expert_gate", "lm_head") if name == "qwen2_moe" else ("lm_head",)
    )
    assert bool(torch.isfinite(run(model)).all())


def test_a_gate_is_quantized_where_asked() -> None:
    model = family_model("qwen2_moe", dtype=torch.float32)
    plan = make_plan(model, make_recipe(format="mxfp4", include=("*.shared_expert_gate",)))
    assert "model.layers.0.mlp.shared_expert_gate" in [layer.name for layer in plan.layers]


def test_experts_that_cannot_be_taken_apart_are_named_in_the_plan() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes, **heads))
    for layer in model.model.layers:
        layer.mlp.experts.has_post_expert_norm = True
    assert unstack_experts(model) == () and len(stacked_experts(model)) == 2
    notes = make_plan(model, make_recipe(format="mxfp4")).notes
    assert len(notes) == 1 and "experts of 2 layers stay as they are: GptOssExperts" in notes[0]


WINDOWS = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(1))


def calibrated(name: str, experts: ExpertTokens) -> QuantizationReport:
    model = family_model(name, dtype=torch.float32)
    recipe = make_recipe(format="mxfp4", method="gptq")
    return quantize_model(model, recipe, calibration=Calibration(windows=WINDOWS, batch=2, experts=experts))


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_each_expert_are_counted(name: str) -> None:
    """Routed, the experts of a layer together see each token as often as it is sent; with all, each sees every one."""
    report = calibrated(name, ExpertTokens.ROUTED)
    counts = report.expert_tokens
    chosen = 2
    for layer in range(FAMILIES[name]):
        own = [count for expert, count in counts.items() if f"layers.{layer}.mlp.experts." in expert]
        assert len(own) == 4 and sum(own) == WINDOWS.numel() * chosen
    fewest = min(counts, key=lambda expert: counts[expert])
    (note,) = [note for note in report.plan.notes if "experts saw" in note]
    assert f"{len(counts)} experts saw between {counts[fewest]} and {max(counts.values())} tokens" in note
    assert f"{fewest} ({counts[fewest]})" in note
    everything = calibrated(name, ExpertTokens.ALL).expert_tokens
    assert everything.keys() == counts.keys() and set(everything.values()) == {WINDOWS.numel()}


@pytest.mark.parametrize("name", FAMILIES)
def test_computing_all_tokens_changes_no_output(name: str) -> None:
    model = family_model(name)
    unstack_experts(model)
    before = run(model)
    with computing(ExpertTokens.ALL):
        torch.testing.assert_close(run(model), before, rtol=1e-9, atol=1e-9)


def test_a_model_without_experts_counts_nothing() -> None:
    report = calibrated("llama", ExpertTokens.ALL)
    assert report.expert_tokens == {} and not any("expert" in note for note in report.plan.notes)
