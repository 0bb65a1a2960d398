"""Experts: a mixture of experts whose every matrix is a linear layer of its own, so that it can be quantized.

transformers 5 keeps the experts of a layer stacked in two parameters: ``gate_up_proj`` [experts, 2 * inner, hidden] and
``down_proj`` [experts, hidden, inner]. Here expert 3 has the linear layers ``3.gate_proj``, ``3.up_proj`` and
``3.down_proj``, as checkpoints of Qwen MoE and their kin name them. What is computed is the same, expert by expert.

Source: ``transformers.integrations.moe`` and the experts' classes of transformers 5 (MixtralExperts, Qwen3MoeExperts).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from microscale.nn.modules import replace_module

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_EXPECTED = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}
"""What a module of stacked experts must say about itself (transformers gives every such module these attributes)."""


def why_not_unstacked(module: nn.Module) -> str | None:
    """Return why a module with stacked experts cannot be taken apart, or None where it can."""
    for name, value in _EXPECTED.items():
        found = getattr(module, name, None)
        if found is not value:
            return f"{type(module).__name__} has {name} {found}, experts that can be taken apart {value}"
    gate = getattr(type(module), "_apply_gate", None)
    if getattr(gate, "__name__", "") != "_default_apply_gate" or not isinstance(
        getattr(module, "act_fn", None), nn.Module
    ):
        return f"{type(module).__name__} joins gate and up in a way of its own"
    if {name for name, _ in module.named_parameters()} != {GATE_UP, DOWN}:
        return f"{type(module).__name__} has other parameters than {GATE_UP} and {DOWN}"
    return None


def has_stacked_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts itself."""
    stacked = dict(module.named_parameters(recurse=False))
    return all(name in stacked and stacked[name].ndim == 3 for name in (GATE_UP, DOWN))


class Expert(nn.Module):
    """One gated feed-forward layer; its matrices [out, in] are taken over as they are."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_proj = _linear(gate)
        self.up_proj = _linear(up)
        self.down_proj = _linear(down)


def _linear(weight: Float[Tensor, "out in"]) -> nn.Linear:
    rows, cols = weight.shape
    layer = nn.Linear(cols, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
    return layer


class Experts(nn.Module):
    """down(act(gate(x)) · up(x)) of the experts that a router chose, summed with its weights.

    The experts are the children ``0``, ``1`` and so on.
    """

    def __init__(self, experts: list[Expert], act_fn: nn.Module) -> None:
        super().__init__()
        self.num_experts = len(experts)
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.act_fn = act_fn

    @classmethod
    def from_stacked(cls, module: nn.Module) -> Experts:
        """Take a module with stacked experts apart; every expert gets a copy of its weights, on the same device."""
        assert why_not_unstacked(module) is None
        stacked, down = module.get_parameter(GATE_UP), module.get_parameter(DOWN)
        experts: list[Expert] = []
        for index in range(stacked.shape[0]):
            gate, up = stacked.detach()[index].chunk(2)
            parts = (part.clone().requires_grad_(stacked.requires_grad) for part in (gate, up, down.detach()[index]))
            experts.append(Expert(*parts))
        act_fn: Any = module.act_fn
        return cls(experts, act_fn).train(module.training)

    def expert(self, index: int) -> Expert:
        """Return one expert."""
        found = self.get_submodule(str(index))
        assert isinstance(found, Expert)
        return found

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens chosen"],
        top_k_weights: Float[Tensor, "tokens chosen"],
    ) -> Float[Tensor, "tokens hidden"]:
        """Apply the chosen experts; an index of ``num_experts`` or more chooses none."""
        result = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if index >= self.num_experts:
                continue
            expert = self.expert(index)
            tokens, places = torch.where(top_k_index == index)
            inputs = hidden_states[tokens]
            outputs = expert.down_proj(self.act_fn(expert.gate_proj(inputs)) * expert.up_proj(inputs))
            outputs = outputs * top_k_weights[tokens, places, None]
            result.index_add_(0, tokens, outputs.to(result.dtype))
        return result


def stacked_experts(model: nn.Module) -> dict[str, str | None]:
    """Return the modules with stacked experts, each with the reason why it cannot be taken apart (None: it can)."""
    return {name: why_not_unstacked(module) for name, module in model.named_modules() if has_stacked_experts(module)}


def every_module(name: str) -> bool:
    """Choose all modules."""
    return True


def unstack_experts(model: nn.Module, chosen: Callable[[str], bool] = every_module) -> tuple[str, ...]:
    """Replace modules with stacked experts by :class:`Experts`; returns the names of those that were replaced.

    What the model computes stays the same, up to the order of sums. Routers are left alone. Experts that cannot be
    taken apart stay as they are: :func:`stacked_experts` says why. ``chosen`` picks modules by name.
    """
    names = tuple(name for name, reason in stacked_experts(model).items() if reason is None and chosen(name))
    for name in names:
        replace_module(model, name, Experts.from_stacked(model.get_submodule(name)))
    return names
