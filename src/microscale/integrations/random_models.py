"""Random Llama models in any format, for measuring speed without files.

The rows of every weight repeat a few hundred random ones: speed does not depend on the numbers, and a model of a
billion weights is there in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from microscale.errors import ShapeError
from microscale.formats import ActivationSpec, Format
from microscale.kernels import quantize
from microscale.nn.linear import QuantizedLinear
from microscale.nn.modules import replace_module
from microscale.tensor import QuantizedTensor

DISTINCT_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """The widths of a Llama model."""

    hidden: int = 1536
    ffn: int = 4096
    layers: int = 12
    heads: int = 12
    kv_heads: int = 4
    vocab: int = 512

    def __str__(self) -> str:
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


def parse_shape(text: str) -> LlamaShape:
    """Read ``hidden=1536,ffn=4096,layers=12,heads=12,kv_heads=4,vocab=512``; what is not named has that default.

    Raises:
        ShapeError: an unknown name, a value that is no positive whole number, or widths that do not fit together.
    """
    known = {field.name for field in fields(LlamaShape)}
    values: dict[str, int] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        name, _, value = word.partition("=")
        if name not in known or not value.isdigit() or int(value) < 1:
            raise ShapeError(
                f"a random Llama is written {LlamaShape()}, each a positive whole number; {word!r} is not understood"
            )
        values[name] = int(value)
    shape = LlamaShape(**values)
    if shape.hidden % (2 * shape.heads) or shape.heads % shape.kv_heads:
        raise ShapeError(
            f"{shape.hidden} hidden must be a multiple of twice the heads ({shape.heads}), and the heads one of the"
            f" kv_heads ({shape.kv_heads})"
        )
    return shape


def random_llama(
    shape: LlamaShape, fmt: Format | None, activations: ActivationSpec | None, *, positions: int, seed: int
) -> Any:
    """Return a random model; its linear layers are packed in ``fmt`` (None: bfloat16), the head stays bfloat16."""
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head" and fmt is not None:
            rows, cols = module.weight.shape
            packed = _random_tensor(rows, cols, fmt, generator)
            replace_module(model, name, QuantizedLinear.from_tensor(packed, activations=activations))
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            size = tuple(parameter.shape)
            values = torch.ones(size) if len(size) < 2 else _random_rows(size[0], size[1], generator)
            setattr(module, key, nn.Parameter(values.to(torch.bfloat16), requires_grad=False))
    return model


def _random_rows(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    few = torch.randn(min(rows, DISTINCT_ROWS), cols, generator=generator) * cols**-0.5
    return few[torch.arange(rows) % few.shape[0]]


def _random_tensor(rows: int, cols: int, fmt: Format, generator: torch.Generator) -> QuantizedTensor:
    few = torch.randn(min(rows, DISTINCT_ROWS), cols, generator=generator) * cols**-0.5
    packed = quantize(few, fmt).select_rows(torch.arange(rows) % few.shape[0])
    return packed if packed is not None else quantize(_random_rows(rows, cols, generator), fmt)
