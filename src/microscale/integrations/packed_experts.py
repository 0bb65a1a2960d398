"""Stacks of experts as other tools pack them (gpt-oss, GGUF), as the linear layers that we run packed, and back.

A stack is one :class:`~microscale.layer_spec.LayerSpec` of kind ``experts``, [experts, rows, cols]; how its rows are
laid out is the model's matter, so the model is built without weights to ask it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microscale.errors import counted
from microscale.integrations.model_class import class_of
from microscale.kernels import dequantize
from microscale.layer_spec import LayerSpec
from microscale.layouts.row_major import NAME as ROW_MAJOR
from microscale.nn.experts import (
    DOWN,
    GATE_UP,
    Experts,
    has_stacked_experts,
    joined_rows,
    split_rows,
    why_not_unstacked,
)
from microscale.nn.linear import QuantizedLinear
from microscale.tensor import QuantizedTensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedStack:
    """A parameter of stacked experts in a file, and the module that it belongs to."""

    layer: LayerSpec
    module: nn.Module

    @property
    def name(self) -> str:
        """The parameter's own name."""
        return self.layer.name.rpartition(".")[2]

    def layers(self) -> dict[str, LayerSpec]:
        """Return what each linear layer of each expert is, by its name in the model taken apart."""
        num_experts, rows, cols = self.layer.shape
        shares = split_rows(self.module, self.name, torch.empty(rows, device="meta"))
        places = {self._place(index, key): len(share) for index in range(num_experts) for key, share in shares.items()}
        return {
            name: dataclasses.replace(self.layer, name=name, kind="linear", shape=(count, cols))
            for name, count in places.items()
        }

    def tensors(self, stack: QuantizedTensor) -> dict[str, QuantizedTensor]:
        """Return the packed weight of each linear layer: rows of the stack, bit for bit."""
        num_experts, _, cols = self.layer.shape
        found: dict[str, dict[str, Tensor]] = {}
        for part, values in stack.parts.items():
            for index, own in enumerate(values.unflatten(0, (num_experts, -1))):
                for key, share in split_rows(self.module, self.name, own).items():
                    found.setdefault(self._place(index, key), {})[part] = share.clone()
        return {
            name: dataclasses.replace(stack, shape=(len(parts["codes"]), cols), parts=parts)
            for name, parts in found.items()
        }

    def biases(self, stack: Tensor) -> dict[str, Tensor]:
        """Return the bias of each linear layer by its name in a state dict."""
        return {
            f"{self._place(index, key)}.bias": share.clone()
            for index, own in enumerate(stack)
            for key, share in split_rows(self.module, self.name, own).items()
        }

    def _place(self, index: int, key: str) -> str:
        return f"{self.layer.name.rpartition('.')[0]}.{index}.{key}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JoinedStack:
    """A parameter of stacked experts that is made of the packed layers of :class:`~microscale.nn.experts.Experts`."""

    layer: LayerSpec
    experts: Experts
    keys: tuple[str, ...]
    """The linear layers of each expert that have a share in the stack."""

    @property
    def members(self) -> list[str]:
        """The names of all linear layers in the stack."""
        place = self.layer.name.rpartition(".")[0]
        return [f"{place}.{index}.{key}" for index in range(self.experts.num_experts) for key in self.keys]

    def tensor(self) -> QuantizedTensor:
        """Return the packed weight, of layers that lie in row_major: the rows of all experts, bit for bit."""
        tensors = [{key: module.tensor for key, module in expert.items()} for expert in self._linears()]
        parts = {
            part: torch.cat([self._joined({key: one.parts[part] for key, one in own.items()}) for own in tensors])
            for part in tensors[0][self.keys[0]].parts
        }
        return QuantizedTensor(
            format=self.layer.format, shape=self.layer.shape, dtype=self.layer.dtype, parts=parts, layout=ROW_MAJOR
        )

    def bias(self) -> Tensor | None:
        """Return the biases [experts, rows], or None."""
        biases = [{key: module.bias for key, module in expert.items()} for expert in self._linears()]
        found = [{key: bias for key, bias in own.items() if bias is not None} for own in biases]
        return torch.stack([self._joined(own) for own in found]) if all(found) else None

    def _joined(self, parts: Mapping[str, Tensor]) -> Tensor:
        return joined_rows(self.experts if self.experts.owner is None else self.experts.owner, parts)

    def _linears(self) -> list[dict[str, QuantizedLinear]]:
        found: list[dict[str, QuantizedLinear]] = []
        for index in range(self.experts.num_experts):
            modules = {key: self.experts.expert(index).get_submodule(key) for key in self.keys}
            found.append({key: module for key, module in modules.items() if isinstance(module, QuantizedLinear)})
        return found


def joined_stacks(model: nn.Module, layers: Mapping[str, LayerSpec]) -> list[JoinedStack]:
    """Return the stacks of a model whose experts have gates and are all packed, those of a stack in one format."""
    found: list[JoinedStack] = []
    for place, experts in model.named_modules():
        if not isinstance(experts, Experts):
            continue
        for name, keys in ((GATE_UP, ("gate_proj", "up_proj")), (DOWN, (DOWN,))):
            first, *others = [layers[f"{place}.{index}.{key}"] for index in range(experts.num_experts) for key in keys]
            methods = dict.fromkeys(layer.method for layer in (first, *others))
            layer = dataclasses.replace(
                first,
                name=f"{place}.{name}",
                shape=(experts.num_experts, first.shape[0] * len(keys), first.shape[1]),
                method=", ".join(methods),
                kind="experts",
                has_bias=False,
            )
            found.append(JoinedStack(layer=layer, experts=experts, keys=keys))
    return found


def packed_stacks(config: Any, layers: Mapping[str, LayerSpec]) -> dict[str, PackedStack]:
    """Return the stacks that can be taken apart, by name: of a known form, all stacks of their module packed."""
    stacks = {name: layer for name, layer in layers.items() if layer.kind == "experts"}
    if not stacks:
        return {}
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = class_of(config)._from_config(config)
    found: dict[str, PackedStack] = {}
    for place, module in model.named_modules():
        if not has_stacked_experts(module) or why_not_unstacked(module) is not None:
            continue
        deep = [f"{place}.{name}" for name, each in module.named_parameters(recurse=False) if each.ndim == 3]
        if all(name in stacks for name in deep):
            found |= {name: PackedStack(layer=stacks[name], module=module) for name in deep}
    return found


def expanded(config: Any, stack: QuantizedTensor) -> Tensor:
    """Return the floats of a stack, with the axes that the model's parameter has."""
    values = dequantize(stack)
    is_transposed = getattr(config, "model_type", "") == "gpt_oss"
    return values.transpose(1, 2).contiguous() if is_transposed else values


def tell_of_expanded(names: Sequence[str]) -> None:
    """Warn of stacks that were expanded to floats."""
    if names:
        warnings.warn(
            f"{counted(len(names), 'stack')} of experts, e.g. {names[0]}, were expanded to floats: where not all"
            " matrices of experts are packed, they cannot be taken apart",
            stacklevel=5,
        )
