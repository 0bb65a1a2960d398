"""Experts: a mixture of experts whose every matrix is a linear layer of its own, so that it can be quantized.

transformers 5 keeps the experts of a layer stacked, as parameters with the experts on their first axis. Here expert 3
has the linear layers ``3.gate_proj``, ``3.up_proj`` and ``3.down_proj``, as checkpoints of Qwen MoE and their kin name
them. What is computed is the same, expert by expert. Three forms are known, each by what the module has and takes:

- *routed*: ``gate_up_proj`` [experts, 2 * inner, hidden] (or ``up_proj`` without a gate) and ``down_proj`` [experts,
  hidden, inner], transposed or not, gate and up one behind the other or in turn, with biases or without; the module
  gets tokens and who chose whom. Numbers beyond the last expert hand the token on where the module says so (Longcat).
- *batched*: the same matrices transposed; the module gets the tokens of each expert in a row (Llama 4).
- *split*: one matrix for each expert in ``weight``; the module gets tokens sorted by expert, and how many each has
  (JetMoE).

Source: ``transformers.integrations.moe`` and the experts' classes of transformers 5 (MixtralExperts, GptOssExperts,
LongcatFlashExperts, Llama4TextExperts, JetMoeParallelExperts).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from microscale.nn.modules import replace_module


class ExpertTokens(Enum):
    """Which tokens an expert computes: those that the router sends it, or all, so that each is measured on enough text.

    What the layer gives is the same: outputs of tokens that were not sent are thrown away. Of split experts (JetMoE)
    those that read tokens compute all, once for each expert that a token is sent to; those that read what other experts
    made compute their own.
    """

    ROUTED = "routed"
    ALL = "all"


_TOKENS: ContextVar[ExpertTokens] = ContextVar("expert_tokens", default=ExpertTokens.ROUTED)


@contextmanager
def computing(tokens: ExpertTokens) -> Generator[None, None, None]:
    """Let experts compute these tokens inside."""
    before = _TOKENS.set(tokens)
    try:
        yield
    finally:
        _TOKENS.reset(before)


GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
BIASES = tuple(f"{name}_bias" for name in (GATE_UP, UP, DOWN))
_DEFAULT_GATE = "_default_apply_gate"


def has_stacked_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts itself."""
    deep = {name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3}
    return deep in ({GATE_UP, DOWN}, {UP, DOWN}) or (deep == {"weight"} and _taken(module) == ("inputs", "expert_size"))


def _taken(module: nn.Module) -> tuple[str, ...]:
    """Return the names of what a module's forward takes."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def why_not_unstacked(module: nn.Module) -> str | None:
    """Return why a module with stacked experts cannot be taken apart, or None where it can."""
    kind, names = type(module).__name__, {name for name, _ in module.named_parameters()}
    if not names <= {GATE_UP, UP, DOWN, *BIASES, "weight"}:
        return f"{kind} has other parameters than those of its experts: {', '.join(sorted(names))}"
    if getattr(module, "has_post_expert_norm", False):
        return f"{kind} has a norm behind its experts"
    if _is_split(module) or _is_batched(module):
        return None
    if not hasattr(module, "has_gate") and not hasattr(module, "identity_expert"):
        return f"{kind} says nothing of how its experts are laid out, and is of no form that we know"
    if not callable(getattr(module, "act_fn", None)) and not _has_own_gate(module):
        return f"{kind} has no activation function that we find"
    return None


def _is_split(module: nn.Module) -> bool:
    return "weight" in dict(module.named_parameters(recurse=False))


def _is_batched(module: nn.Module) -> bool:
    return _taken(module) == ("hidden_states",) and isinstance(getattr(module, "act_fn", None), nn.Module)


def _has_own_gate(module: nn.Module) -> bool:
    """Whether a module joins gate and up in a way of its own, or by a function that is no module: it is asked then."""
    gate = getattr(type(module), "_apply_gate", None)
    act_fn = getattr(module, "act_fn", None)
    is_plain = gate is None or act_fn is None or isinstance(act_fn, nn.Module)
    return getattr(gate, "__name__", _DEFAULT_GATE) != _DEFAULT_GATE or not is_plain


def _linear(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None) -> nn.Linear:
    rows, cols = weight.shape
    layer = nn.Linear(cols, rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=bias.requires_grad)
    return layer


def _matrices(module: nn.Module, name: str, *, is_transposed: bool) -> Sequence[tuple[Tensor, Tensor | None]]:
    """Return the matrix [out, in] and the bias of every expert, as views."""
    stacked = module.get_parameter(name).detach()
    biases = dict(module.named_parameters()).get(f"{name}_bias")
    return [
        (matrix.T if is_transposed else matrix, None if biases is None else biases.detach()[index])
        for index, matrix in enumerate(stacked)
    ]


def split_rows(module: nn.Module, name: str, rows: Tensor) -> dict[str, Tensor]:
    """Return what each linear layer of one expert has of a parameter of stacked experts, whose rows come first.

    ``name`` is the parameter's: rows of ``gate_up_proj`` (its bias too) belong to gate and up.
    """
    if name != GATE_UP:
        return {name: rows}
    if not getattr(module, "is_concatenated", True):
        return {"gate_proj": rows[::2], "up_proj": rows[1::2]}
    gate, up = rows.chunk(2)
    return {"gate_proj": gate, "up_proj": up}


def joined_rows(module: nn.Module, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the rows of one expert's matrix in stacked experts, from those of its linear layers: undoes split_rows."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    halves = (parts["gate_proj"], parts["up_proj"])
    is_in_turn = not getattr(module, "is_concatenated", True)
    return torch.stack(halves, 1).flatten(0, 1) if is_in_turn else torch.cat(halves)


class Expert(nn.Module):
    """One feed-forward layer, gated or not; its matrices [out, in] are copies."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, layers: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        for name, parts in layers.items():
            weight, bias = parts
            self.add_module(name, _linear(weight.clone(), None if bias is None else bias.clone()))

    @property
    def has_gate(self) -> bool:
        """Whether the expert has a gate beside up."""
        return "gate_proj" in self._modules


def _experts_of(module: nn.Module) -> list[Expert]:
    """Return the experts of a routed or batched module."""
    own: Any = module
    is_transposed = _is_batched(module) or bool(getattr(own, "is_transposed", False))
    names = {GATE_UP, UP, DOWN} & dict(module.named_parameters()).keys()
    is_trained = module.get_parameter(DOWN).requires_grad
    matrices = {
        name: _matrices(module, name, is_transposed=is_transposed) for name in (GATE_UP, UP, DOWN) if name in names
    }
    experts: list[Expert] = []
    for index in range(len(matrices[DOWN])):
        layers: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name, stack in matrices.items():
            weight, bias = stack[index]
            biases = {} if bias is None else split_rows(module, name, bias)
            layers |= {key: (part, biases.get(key)) for key, part in split_rows(module, name, weight).items()}
        experts.append(Expert(layers).requires_grad_(is_trained))
    return experts


class Experts(nn.Module):
    """down(act(gate(x)) · up(x)) of the experts that a router chose, summed with its weights.

    The experts are the children ``0``, ``1`` and so on; ``num_handing_on`` more hand the token on as it is. ``owner``
    is a module without parameters that joins gate and up in its own way; it has no name in the model.
    """

    owner: Any

    def __init__(
        self, experts: Sequence[nn.Module], act_fn: nn.Module | None, *, num_handing_on: int = 0, owner: Any = None
    ) -> None:
        super().__init__()
        self.num_experts = len(experts)
        self.num_handing_on = num_handing_on
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)
        self.act_fn = act_fn
        self.__dict__["owner"] = (
            owner  # a module without parameters that joins gate and up; no child, for it has no name
        )

    @classmethod
    def from_stacked(cls, module: nn.Module) -> Experts:
        """Take a module with stacked experts apart; every expert gets a copy of its weights, on the same device."""
        assert why_not_unstacked(module) is None
        own: Any = module
        if _is_split(module):
            weights = own.weight.detach()
            made: Experts = SplitExperts([_linear(each.clone()) for each in weights], None)
            return made.train(module.training)
        kind = BatchedExperts if _is_batched(module) else cls
        experts = _experts_of(module)
        owner = None
        if _has_own_gate(module):
            owner = module
            for name in [name for name, _ in module.named_parameters()]:
                owner._parameters.pop(name)
        num_handing_on = getattr(own, "total_experts", len(experts)) - len(experts)
        act_fn = getattr(own, "act_fn", None)
        return kind(experts, act_fn, num_handing_on=num_handing_on, owner=owner).train(module.training)

    def expert(self, index: int) -> Expert:
        """Return one expert."""
        found = self.get_submodule(str(index))
        assert isinstance(found, Expert)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        super()._apply(fn, recurse)
        if self.owner is not None:
            self.owner._apply(fn, recurse)
        return self

    def apply_expert(self, index: int, inputs: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """Return what one expert makes of tokens."""
        expert: Any = self.expert(index)
        if not expert.has_gate:
            assert self.act_fn is not None
            return expert.down_proj(self.act_fn(expert.up_proj(inputs)))
        if self.owner is None:
            assert self.act_fn is not None
            return expert.down_proj(self.act_fn(expert.gate_proj(inputs)) * expert.up_proj(inputs))
        halves = (expert.gate_proj(inputs), expert.up_proj(inputs))
        is_in_turn = not getattr(self.owner, "is_concatenated", True)
        joined = torch.stack(halves, -1).flatten(-2) if is_in_turn else torch.cat(halves, -1)
        return expert.down_proj(self.owner._apply_gate(joined))

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens chosen"],
        top_k_weights: Float[Tensor, "tokens chosen"],
    ) -> Float[Tensor, "tokens hidden"]:
        """Apply the chosen experts; an index beyond all of them chooses none."""
        result = torch.zeros_like(hidden_states)
        is_all = _TOKENS.get() is ExpertTokens.ALL
        chosen = set(torch.unique(top_k_index).tolist()) | set(range(self.num_experts) if is_all else ())
        for index in sorted(chosen):
            if index >= self.num_experts + self.num_handing_on:
                continue
            tokens, places = torch.where(top_k_index == index)
            inputs = hidden_states[tokens]
            if index >= self.num_experts:
                outputs = inputs
            else:
                outputs = (
                    self.apply_expert(index, hidden_states)[tokens] if is_all else self.apply_expert(index, inputs)
                )
            outputs = outputs * top_k_weights[tokens, places, None]
            result.index_add_(0, tokens, outputs.to(result.dtype))
        return result


class BatchedExperts(Experts):
    """The experts of Llama 4: each gets a run of rows of its own, zeros in place of tokens that it is not sent."""

    def forward(self, hidden_states: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply every expert to the tokens in its run; of zeros it makes zeros, unless it has biases."""
        runs = hidden_states.reshape(self.num_experts, -1, hidden_states.shape[-1])
        has_biases = any(getattr(layer, "bias", None) is not None for layer in self.modules())
        sent = torch.ones_like(runs[..., 0], dtype=torch.bool) if has_biases else runs.any(-1)
        tokens = runs.sum(0) if _TOKENS.get() is ExpertTokens.ALL else None
        result = torch.zeros_like(runs)
        for index, run in enumerate(runs):
            if tokens is None and not bool(sent[index].any()):
                continue
            if tokens is not None:
                outputs = self.apply_expert(index, torch.where(sent[index, :, None], run, tokens))[sent[index]]
            else:
                outputs = self.apply_expert(index, run[sent[index]])
            result[index, sent[index]] = outputs.to(result.dtype)
        return result.flatten(0, 1)


class SplitExperts(Experts):
    """The experts of JetMoE: one matrix each, applied to as many rows as chose it.

    ``is_first``: they read tokens, and not what other experts made of them.
    """

    is_first = True

    def forward(self, inputs: Float[Tensor, "rows in"], expert_size: Sequence[int]) -> Float[Tensor, "rows out"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the matrix of each expert to its rows."""
        pieces = inputs.split(list(expert_size))
        if self.is_first and _TOKENS.get() is ExpertTokens.ALL:
            outputs = [self.get_submodule(str(index))(inputs) for index in range(len(pieces))]
            return torch.cat([all_.split(list(expert_size))[index] for index, all_ in enumerate(outputs)])
        return torch.cat([self.get_submodule(str(index))(piece) for index, piece in enumerate(pieces)])


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
    behind: set[str] = set()
    for name in names:
        made, parent = Experts.from_stacked(model.get_submodule(name)), name.rpartition(".")[0]
        if isinstance(made, SplitExperts):
            made.is_first = parent not in behind
            behind.add(parent)
        replace_module(model, name, made)
    return names
