"""What is read from the source of a forward pass, held against what a forward pass does."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from microscale.families.forward_source import (
    expert_counts,
    expert_stacks,
    names_read_by_parents,
    router_names,
)

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MIX = SIZES | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": SIZES | {"state_size": 4, "time_step_rank": 2},
    "falcon_mamba": SIZES | {"state_size": 4, "time_step_rank": 2},
    "jamba": MIX | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_dt_rank": 2},
    "longcat_flash": SIZES
    | {
        "num_layers": 1,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
        "num_key_value_heads": 4,
    },
    "afmoe": MIX | {"num_dense_layers": 0, "head_dim": 8, "num_shared_experts": 1},
    "mixtral": MIX,
    "llama": SIZES,
}
READ = {"mamba": {"dt_proj"}, "falcon_mamba": {"dt_proj"}, "jamba": {"dt_proj"}, "longcat_flash": {"classifier"}}
ROUTERS = {"longcat_flash": {"classifier"}, "afmoe": {"gate"}}


def tiny(family: str) -> Any:
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_config(config).eval()


class _Watch(TorchFunctionMode):
    """Notes which weights are computed with outside of the forward call of their own layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self.names = {id(module.weight): name for name, module in linears.items()}
        self.inside: list[int] = []
        self.read: set[str] = set()
        for module in linears.values():
            module.register_forward_pre_hook(lambda module, args: self.inside.append(id(module.weight)))
            module.register_forward_hook(lambda module, args, output: self.inside.pop() and None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":
            for each in [*args, *(kwargs or {}).values()]:
                if isinstance(each, Tensor) and id(each) in self.names and id(each) not in self.inside:
                    self.read.add(self.names[id(each)])
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(model: nn.Module) -> Generator[_Watch]:
    with _Watch(model) as watch:
        yield watch


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_a_parent_multiplies_by(family: str) -> None:
    model = tiny(family)
    found = {name.rpartition(".")[2] for name in names_read_by_parents(model)}
    assert found >= READ.get(family, set())
    with watched(model) as watch, torch.no_grad():
        model(input_ids=torch.arange(6)[None], use_cache=False)
    assert watch.read <= names_read_by_parents(model), "a forward pass read what its source does not show"
    if family in ("llama", "mixtral", "afmoe"):
        assert not found and not watch.read
    if family in ("mamba", "jamba", "longcat_flash"):
        assert watch.read, "the watch sees nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_what_chooses_experts(family: str) -> None:
    assert {name.rpartition(".")[2] for name in router_names(tiny(family))} == ROUTERS.get(family, set())


def test_stacks_of_experts() -> None:
    model = tiny("mixtral")
    stacks = expert_stacks(model)
    assert set(stacks.values()) == {4} and len(stacks) == 4 and all(".experts." in name for name in stacks)
    model.model.register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, 32)))
    model.model.register_parameter("table", nn.Parameter(torch.zeros(3, 8, 32)))
    assert expert_stacks(model) == stacks, "a table with three axes holds no experts"
    assert expert_stacks(tiny("llama")) == {} and expert_counts(tiny("llama")) == frozenset()


class Odd(nn.Module):
    """Reads weights in all the ways that a forward pass may."""

    def __init__(self) -> None:
        super().__init__()
        self.direct, self.aliased, self.asked, self.called = (nn.Linear(4, 4) for _ in range(4))
        self.several: Any = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.indexed: Any = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        nn.init.zeros_(self.called.weight)

    def forward(self, inputs: Any) -> Any:
        other = self.aliased
        inputs = inputs.to(self.asked.weight.dtype) if hasattr(self.called.weight, "shape") else inputs
        inputs = functional.linear(self.called(inputs), other.weight)
        for layer in self.several:
            inputs = inputs @ layer.weight
        return self._more(inputs) @ self.indexed[0].weight

    def _more(self, inputs: Any) -> Any:
        return inputs @ self.direct.weight.t()


def test_all_ways_to_read_a_weight() -> None:
    model = nn.ModuleDict({"odd": Odd()})
    wanted = {"direct", "aliased", "several.0", "several.1", "indexed.0", "indexed.1"}
    assert names_read_by_parents(model) == {f"odd.{name}" for name in wanted}


def test_the_attention_of_torch_reads_its_output_projection() -> None:
    assert names_read_by_parents(nn.MultiheadAttention(8, 2)) == {"out_proj"}
