"""Experts taken apart compute what the stacked ones did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from family_models import family_model
from microscale.families.forward_source import expert_stacks
from microscale.nn.experts import (
    Experts,
    ExpertTokens,
    SplitExperts,
    computing,
    has_stacked_experts,
    unstack_experts,
    why_not_unstacked,
)
from tiny_models import logits, tiny_model

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe"]


def stacked(name: str) -> Any:
    return family_model(name).model.layers[0].mlp.experts


def routed(module: Any, chosen: int = 2, tokens: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(tokens, 32, generator=generator, dtype=torch.float64)
    scores = torch.rand(tokens, module.num_experts, generator=generator, dtype=torch.float64)
    weights, indices = scores.topk(chosen)
    return inputs, indices, weights


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_the_same_function(name: str, tokens: int) -> None:
    module = stacked(name)
    assert has_stacked_experts(module) and why_not_unstacked(module) is None
    apart = Experts.from_stacked(module)
    arguments = routed(module, tokens=tokens)
    with torch.no_grad():
        torch.testing.assert_close(apart(*arguments), module(*arguments), rtol=1e-12, atol=1e-12)


def test_experts_that_no_token_chose_and_numbers_beyond_the_last() -> None:
    module = stacked("mixtral")
    inputs, _, weights = routed(module)
    indices = torch.tensor([[1, 4]]).expand(30, 2)  # 4: a place that another device would compute
    apart = Experts.from_stacked(module)
    with torch.no_grad():
        torch.testing.assert_close(apart(inputs, indices, weights), module(inputs, indices, weights))
        nothing = apart(inputs, torch.full((30, 2), 4), weights)
    assert not bool(nothing.any())


def test_names_and_weights() -> None:
    module = stacked("qwen3_moe")
    apart = Experts.from_stacked(module)
    names = ("gate_proj", "up_proj", "down_proj")
    assert list(apart.state_dict()) == [f"{expert}.{name}.weight" for expert in range(4) for name in names]
    assert torch.equal(apart.expert(2).gate_proj.weight, module.gate_up_proj[2, :24])
    assert torch.equal(apart.expert(2).up_proj.weight, module.gate_up_proj[2, 24:])
    assert torch.equal(apart.expert(3).down_proj.weight, module.down_proj[3])
    assert apart.training == module.training
    with torch.no_grad():
        apart.expert(0).down_proj.weight.zero_()
    assert bool(module.down_proj[0].any()), "a copy, not a view"


def test_a_module_without_memory_is_taken_apart_too() -> None:
    with torch.device("meta"):
        config = AutoConfig.for_model("mixtral", hidden_size=32, intermediate_size=48, num_hidden_layers=1)
        model = AutoModelForCausalLM.from_config(config)
    apart = Experts.from_stacked(model.model.layers[0].mlp.experts)
    assert apart.expert(0).up_proj.weight.is_meta and apart.expert(0).up_proj.weight.shape == (48, 32)


FORMS = {
    "gpt_oss": "transposed, in turn, with biases and a gate of its own",
    "aria_text": "transposed",
    "nemotron_h": "without a gate",
    "longcat_flash": "with experts that hand the token on",
    "llama4_text": "batched",
    "jetmoe": "split",
    "lfm2_moe": "with a function in place of a module",
    "minimax_m3_vl_text": "with a gate of its own",
    "deepseek_v4": "with a gate of its own",
}


@pytest.mark.parametrize("family", FORMS)
def test_every_form_computes_the_same_apart(family: str) -> None:
    more: dict[str, Any] = {"zero_expert_num": 3} if family == "longcat_flash" else {}
    model = tiny_model(family, **more)
    before, stacks = logits(model), expert_stacks(model)
    names = unstack_experts(model)
    assert names and not expert_stacks(model), "nothing stays stacked"
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    linears = sum(isinstance(each, nn.Linear) for name in names for each in model.get_submodule(name).modules())
    joined = sum(name.endswith("gate_up_proj") for name in stacks)
    num_experts = 4
    assert linears == num_experts * (len(stacks) + joined)


def rows_seen(model: Any, tokens: ExpertTokens) -> tuple[Tensor, dict[str, int]]:
    """Return the logits, and how many rows each linear layer of an expert got."""
    seen: dict[str, int] = {}
    names = {module: name for name, module in model.named_modules()}
    inside = [each for module in model.modules() if isinstance(module, Experts) for each in module.modules()]

    def count(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[names[module]] = seen.get(names[module], 0) + arguments[0].shape[0]

    hooks = [each.register_forward_pre_hook(count) for each in inside if isinstance(each, nn.Linear)]
    with computing(tokens):
        found = logits(model)
    for hook in hooks:
        hook.remove()
    return found, seen


@pytest.mark.parametrize("family", FORMS)
def test_every_form_measures_all_tokens_where_asked(family: str) -> None:
    """What is computed stays the same; each expert gets the tokens that it is sent, or every one."""
    changes: dict[str, Any] = {"zero_expert_num": 3} if family == "longcat_flash" else {}
    model = tiny_model(family, **changes)
    unstack_experts(model)
    before, routed_rows = rows_seen(model, ExpertTokens.ROUTED)
    after, all_rows = rows_seen(model, ExpertTokens.ALL)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    second = {
        f"{name}.{index}"
        for name, module in model.named_modules()
        if isinstance(module, SplitExperts) and not module.is_first
        for index in range(4)
    }
    assert len(second) == (16 if family == "jetmoe" else 0)
    first = {name: count for name, count in all_rows.items() if name not in second}
    assert len(set(first.values())) == 1
    assert sum(routed_rows.values()) < sum(all_rows.values()), "routed, an expert gets fewer"
    assert all(all_rows[name] == routed_rows.get(name) for name in second & all_rows.keys())


def test_biases_and_rows_in_turn() -> None:
    module = tiny_model("gpt_oss").model.layers[0].mlp.experts
    gate_up, bias = module.gate_up_proj.detach().clone(), module.gate_up_proj_bias.detach().clone()
    expert = Experts.from_stacked(module).expert(2)
    gate, up = expert.gate_proj, expert.up_proj
    assert torch.equal(gate.weight, gate_up[2].T[::2]) and torch.equal(up.weight, gate_up[2].T[1::2])
    assert torch.equal(gate.bias, bias[2, ::2]) and torch.equal(up.bias, bias[2, 1::2])


def test_experts_of_another_kind_are_refused() -> None:
    assert not has_stacked_experts(nn.Linear(2, 2))
    one = stacked("mixtral")
    one.extra = nn.Parameter(torch.ones(2))
    assert "other parameters" in str(why_not_unstacked(one))
    normed = stacked("mixtral")
    normed.has_post_expert_norm = True
    assert "a norm behind its experts" in str(why_not_unstacked(normed))
    unknown = stacked("mixtral")
    del unknown.has_gate
    assert "says nothing of how its experts are laid out" in str(why_not_unstacked(unknown))
    silent = stacked("mixtral")
    silent.act_fn = None
    assert "no activation function" in str(why_not_unstacked(silent))
