"""Take a transformers model apart for the decoder runtime, or say why it cannot run there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from microscale.errors import ModelError
from microscale.families.decoders import DECODER_FAMILIES, DecoderFamily
from microscale.formats import Format
from microscale.kernels import Gate
from microscale.kernels.decoder_ops import decoder_refusal
from microscale.nn.attention_setting import model_attention
from microscale.nn.decoder import DEFAULT_CHUNK, Decoder, DecoderParts, LayerParts, Norm
from microscale.nn.embedding import NarrowEmbedding, QuantizedEmbedding
from microscale.nn.linear import QuantizedLinear

FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone, not on the length of the text."""
_GATES = {"silu": Gate.SILU, "swish": Gate.SILU, "gelu_pytorch_tanh": Gate.GELU_TANH, "gelu_new": Gate.GELU_TANH}


def why_not_decoder(model: Any, device: torch.device | None = None) -> str | None:
    """Return why the decoder runtime does not run a model, or None where it does: faster than transformers.

    ``device`` is where the model will be (default: where it is); its tensors may lie on ``meta`` meanwhile.
    """
    return _structure_refusal(model) or decoder_refusal(device or next(model.parameters()).device, torch.float32)


def _structure_refusal(model: Any) -> str | None:
    """Return what the decoder runtime does not know of a model, on any backend."""
    attention = model_attention(model)
    if attention is not None:
        return f"it does not round attention; this model has {attention}"
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", "none of transformers")
    family = DECODER_FAMILIES.get(kind)
    if config is None or family is None or type(model).__name__ != family.architecture:
        known = ", ".join(DECODER_FAMILIES)
        return f"it runs the families {known}; this is {type(model).__name__} of the family {kind}"
    devices = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        return f"it runs on one device; the model lies on {', '.join(sorted(devices))}"
    rotary = model.get_submodule(family.rotary).rope_type
    if rotary not in FIXED_ROTARY:
        return f"the rotary embedding {rotary!r} depends on the length of the text; fixed ones are {FIXED_ROTARY}"
    if config.hidden_act not in _GATES:
        return f"the activation function {config.hidden_act!r} is none of {', '.join(_GATES)}"
    return _module_refusal(model, family)


def _module_refusal(model: Any, family: DecoderFamily) -> str | None:
    """Return which module is not as the family has it."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"the module {name or 'of the model'} has hooks, which it would not call"
    expected: dict[str, type | tuple[type, ...]] = {
        family.embedding: (nn.Embedding, NarrowEmbedding, QuantizedEmbedding),
        family.head: (nn.Linear, QuantizedLinear),
    }
    layers: list[nn.Module] = list(model.get_submodule(family.layers))
    if not layers:
        return "the model has no layers"
    for index, layer in enumerate(layers):
        expected |= {f"{family.layers}.{index}.{name}": (nn.Linear, QuantizedLinear) for name in family.linears}
        known = {*family.linears, *family.norms}
        leaves = {name.rpartition(".")[0] for name, _ in layer.named_parameters()}
        odd = sorted(leaves - known)
        if odd:
            return f"the module {family.layers}.{index}.{odd[0]} is not part of the family"
    for name, types in expected.items():
        module = model.get_submodule(name)
        if type(module) not in (types if isinstance(types, tuple) else (types,)):
            return f"the module {name} is a {type(module).__name__}"
    embedding = model.get_submodule(family.embedding)
    if getattr(embedding, "max_norm", None) is not None:
        return "the embedding rescales its rows (max_norm)"
    if isinstance(embedding, QuantizedEmbedding) and embedding.scaling is not None:
        return f"the embedding scales its rows ({type(embedding.scaling).__name__})"
    return None


def make_decoder(
    model: Any, *, positions: int, cache_dtype: Format | torch.dtype = torch.float32, chunk: int = DEFAULT_CHUNK
) -> Decoder:
    """Build the decoder of a model; it shares the model's weights, and lays packed ones out anew in their modules.

    It runs on any backend and device, slowly on the reference one (:func:`why_not_decoder`).

    Raises:
        ModelError: a model that the runtime cannot run, with the reason.
    """
    reason = _structure_refusal(model)
    if reason is not None:
        raise ModelError(f"the decoder runtime cannot run this model: {reason}")
    return Decoder(decoder_parts(model), positions=positions, cache=cache_dtype, chunk=chunk)


def decoder_parts(model: Any) -> DecoderParts:
    """Take a model of a known family apart."""
    config = model.config
    family = DECODER_FAMILIES[config.model_type]
    layers = list(model.get_submodule(family.layers))
    head_dim = layers[0].self_attn.head_dim
    rotary = model.get_submodule(family.rotary)

    @torch.inference_mode()
    def tables(positions: int) -> tuple[Tensor, Tensor]:
        device = next(model.parameters()).device
        places = torch.arange(positions, device=device)[None]
        cosines, sines = rotary(torch.zeros(1, dtype=torch.float32, device=device), places)
        return cosines[0].contiguous(), sines[0].contiguous()

    return DecoderParts(
        embedding=model.get_submodule(family.embedding),
        layers=tuple(_layer_parts(layer, index, family, config) for index, layer in enumerate(layers)),
        final_norm=_norm(model.get_submodule(family.final_norm)),
        head=model.get_submodule(family.head),
        num_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        gate=_GATES[config.hidden_act],
        rotary=tables,
    )


def _layer_parts(layer: nn.Module, index: int, family: DecoderFamily, config: Any) -> LayerParts:
    return LayerParts(
        input_norm=_norm(layer.get_submodule(family.input_norm)),
        query=layer.get_submodule(family.query),
        key=layer.get_submodule(family.key),
        value=layer.get_submodule(family.value),
        query_norm=None if family.query_norm is None else _norm(layer.get_submodule(family.query_norm)),
        key_norm=None if family.key_norm is None else _norm(layer.get_submodule(family.key_norm)),
        output=layer.get_submodule(family.output),
        mlp_norm=_norm(layer.get_submodule(family.mlp_norm)),
        gate=layer.get_submodule(family.gate),
        up=layer.get_submodule(family.up),
        down=layer.get_submodule(family.down),
        window=_window(config, index),
    )


def _window(config: Any, index: int) -> int | None:
    """Return how many positions a layer sees: families with layer types say it for each, others for all at once."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is not None and types[index] != "sliding_attention":
        return None
    return window


def _norm(module: Any) -> Norm:
    return Norm(weight=module.weight.detach().to(torch.float32).contiguous(), eps=float(module.variance_epsilon))
