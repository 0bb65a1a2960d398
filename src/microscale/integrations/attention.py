"""Round the attention of a transformers model: a function of ours in the place of ``eager`` and ``sdpa``.

transformers asks a registry for the function that the model's config names, with the family's own one as the default.
Ours calls that one, with rounded operands (:mod:`microscale.nn.attention`). Families whose attention does not ask the
registry are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from microscale.errors import ModelError
from microscale.families.parts import is_of_part, part_roots
from microscale.nn.attention import rounded_attention
from microscale.nn.attention_setting import NOT_ROUNDED, AttentionFormats, attention_formats, set_attention_formats

IMPLEMENTATION = "microscale"
"""The name of our function in transformers."""
_REGISTRY, _OWN = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"
_BEFORE = "_attention_before"


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """Compute attention as the family of the module does, with the roundings that the module notes."""
    own = own_attention(module)
    assert own is not None
    formats = attention_formats(module)
    if formats is None:
        return own(module, query, key, value, attention_mask, **options)
    return rounded_attention(own, module, query, key, value, attention_mask, formats, **options)


def own_attention(module: nn.Module) -> Callable[..., Any] | None:
    """Return the plain attention of the module's family, None for modules that do not ask the registry for one."""
    forward: Any = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    if _REGISTRY not in names or _OWN not in names:
        return None
    return cast("Callable[..., Any] | None", forward.__globals__.get(_OWN))


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of attention that can be rounded, by name; those of other parts than language are left out.

    Raises:
        ModelError: there are none.
    """
    roots = part_roots(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if own_attention(module) is not None and is_of_part(name, "language", roots)
    }
    if not found:
        raise ModelError(
            f"the attention of {type(model).__name__} cannot be rounded: it does not call transformers' attention"
            " interface; leave attention and the KV cache as they are"
        )
    return found


def apply_attention(model: Any, formats: AttentionFormats | None) -> None:
    """Round the attention of a model from now on; None takes all roundings back.

    Raises:
        ModelError: a model whose attention cannot be rounded; it is as before.
    """
    if formats is None or formats == NOT_ROUNDED:
        before = model.__dict__.pop(_BEFORE, None)
        for module in model.modules():
            set_attention_formats(module, None)
        if before is not None:
            model.set_attn_implementation(before)
        return
    modules = attention_modules(model)
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    for name, module in modules.items():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) != IMPLEMENTATION:
            model.set_attn_implementation(before)
            raise ModelError(f"transformers does not let the attention of {name} be set; leave it as it is")
    if before != IMPLEMENTATION:
        model.__dict__[_BEFORE] = before
    for module in modules.values():
        set_attention_formats(module, formats)
