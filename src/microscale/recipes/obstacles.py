"""Why a model as a whole does not fit into a file layout, and which of its layers a layout has no place for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from torch import nn

from microscale.checkpoint.gpt_oss import GptOssLayout
from microscale.families.forward_source import expert_stacks, names_read_by_parents
from microscale.formats import format_name
from microscale.layer_spec import LayerSpec
from microscale.nn.attention_setting import attention_entry, model_attention
from microscale.nn.experts import Experts

GPT_OSS = GptOssLayout.name

RENAMED_EXPERTS = {"mixtral": "block_sparse_moe.experts.0.w1"}
"""Families whose experts have other names in checkpoints than in the model, by ``model_type``."""

ATTENTION_OBSTACLE = "it has no place for the rounding of attention"
"""Why other layouts than ours cannot hold a model whose attention is rounded."""


def layout_obstacle(model: nn.Module, word: str | None, layers: Mapping[str, LayerSpec]) -> str | None:
    """Return why a model, with these layers quantized, should not be in the layout asked for, or None.

    ``auto`` and None ask for the layout of compressed-tensors. Quark's and ours hold what they hold layer by layer.
    """
    if word == "microscale":
        return None
    if word in ("quark", GPT_OSS) and model_attention(model) is not None:
        return ATTENTION_OBSTACLE
    if word == "quark":
        return None
    return _gpt_oss_obstacle(model, layers) if word == GPT_OSS else _compressed_tensors_obstacle(model, word, layers)


def layers_without_place(model: nn.Module, word: str | None, names: Collection[str]) -> set[str]:
    """Return the layers, among ``names``, that a layout never holds: in that of gpt-oss all but experts."""
    places = tuple(f"{name}." for name, _ in _experts(model))
    return {name for name in names if not name.startswith(places)} if word == GPT_OSS and places else set()


def _experts(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Experts))


def _compressed_tensors_obstacle(model: nn.Module, word: str | None, layers: Collection[str]) -> str | None:
    """Return why not in the layout of compressed-tensors.

    transformers 5.23 fails to load experts that it keeps stacked beside compressed layers. Experts one by one it loads
    rightly only where all are MXFP4 with float inputs; with others it fails, or runs something else. So who names the
    layout (``word``) for another reader gets it, but ``auto`` chooses ours.
    """
    if any(_experts(model)):
        family = _family(model)
        if family in RENAMED_EXPERTS:
            return f"readers of that layout look for the experts of {family} as {RENAMED_EXPERTS[family]}"
        if word == "auto":
            return "transformers does not run all experts of compressed-tensors as the file says"
    if attention_entry(model):
        return ATTENTION_OBSTACLE
    for name in expert_stacks(model):
        if not name.endswith(".weight"):
            return f"transformers cannot load stacked experts ({name}) beside compressed-tensors layers"
    for name in sorted(names_read_by_parents(model) & set(layers)):
        return f"{type(model).__name__} reads the weight of {name} itself, which that layout packs under another name"
    return None


def _gpt_oss_obstacle(model: nn.Module, layers: Mapping[str, LayerSpec]) -> str | None:
    """Return why not in the layout of gpt-oss, whose stacks are packed as a whole and in one format."""
    if _family(model) != "gpt_oss":
        return f"it is for models of type gpt_oss, and {type(model).__name__} is of type {_family(model)!r}"
    for place, experts in _experts(model):
        inside = [name for name, module in experts.named_modules() if name.endswith("_proj") and module is not experts]
        names = [f"{place}.{name}" for name in inside]
        left = [name for name in names if name not in layers]
        if left:
            return f"the experts of a layer are packed as a whole there, but {left[0]} is to stay in floats"
        formats = {format_name(layers[name].format): name for name in names}
        if len(formats) > 1:
            both = " and ".join(f"{name} is {word}" for word, name in formats.items())
            return f"the experts of a layer have one format there, but {both}"
    return None


def _family(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))
