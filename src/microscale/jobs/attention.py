"""Round the attention of a model that is at hand."""

from __future__ import annotations

from typing import Any

from torch import nn

from microscale.errors import ModelError, check_kind
from microscale.integrations.attention import apply_attention
from microscale.integrations.hf_quantizer import MicroscaleConfig
from microscale.nn.attention_setting import AttentionFormats, attention_entry


def round_attention(model: Any, formats: AttentionFormats) -> Any:
    """Round the attention of a transformers model and note it in its config; see :func:`microscale.quantize_attention`.

    Raises:
        ModelError: a model whose attention cannot be rounded.
    """
    check_kind(model, nn.Module, "the model", "a model of transformers", error=ModelError)
    apply_attention(model, formats)
    noted = getattr(model.config, "quantization_config", None)
    if isinstance(noted, MicroscaleConfig):
        noted.set_entry("attention", attention_entry(model).get("attention"))
    return model
