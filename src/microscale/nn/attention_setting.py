"""What a model's attention is rounded to: the record, its words, its place on a module and in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from microscale.errors import CheckpointError, FormatError
from microscale.formats import (
    ActivationSpec,
    Format,
    RangeKind,
    SegmentedFormat,
    format_name,
    parse_activation,
    spec_text,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFormats:
    """What attention is rounded to; None leaves a side as it is.

    ``products``: queries, keys, probabilities and values as they enter the two products. ``kv_cache``: keys and values
    as they are stored, which comes first.
    """

    products: Format | None = None
    kv_cache: Format | None = None

    @property
    def words(self) -> dict[str, str | None]:
        """Names of the formats by ``products`` and ``kv_cache``."""
        named = {"products": self.products, "kv_cache": self.kv_cache}
        return {key: None if fmt is None else format_name(fmt) for key, fmt in named.items()}

    def __str__(self) -> str:
        words = self.words
        sides = [("products of attention", words["products"]), ("KV cache", words["kv_cache"])]
        return ", ".join(f"{side} in {word}" for side, word in sides if word is not None) or "attention not rounded"


def parse_attention(word: str | Format | ActivationSpec | None) -> Format | None:
    """Return the format of a word; None for ``none`` or no word.

    Raises:
        FormatError: no format, segments (which belong to one width), or a range that is kept from call to call.
    """
    if word is None or word == "none":
        return None
    spec = parse_activation(word)
    if spec.range is not RangeKind.DYNAMIC:
        raise FormatError(f"attention is rounded by the numbers at hand; write {format_name(spec.format)}, not {spec}")
    if isinstance(spec.format, SegmentedFormat):
        raise FormatError(
            f"attention has no fixed width that the segments of {format_name(spec.format)} could fill; name one format"
        )
    return spec.format


def set_attention_formats(module: nn.Module, formats: AttentionFormats | None) -> None:
    """Note on a module of attention what it is to be rounded to; None removes the note."""
    if formats is None:
        module.__dict__.pop("attention_formats", None)
    else:
        module.__dict__["attention_formats"] = formats


def attention_formats(module: nn.Module) -> AttentionFormats | None:
    """Return what a module of attention is rounded to, or None."""
    return cast("AttentionFormats | None", module.__dict__.get("attention_formats"))


def model_attention(model: nn.Module) -> AttentionFormats | None:
    """Return what the attention of a model is rounded to, by the first module that is; None where none is."""
    found = (attention_formats(module) for module in model.modules())
    return next((formats for formats in found if formats is not None), None)


def attention_entry(model: nn.Module) -> dict[str, Any]:
    """Return what ``quantization_config`` says about a model's attention: ``{"attention": …}``, or nothing."""
    formats = model_attention(model)
    if formats is None:
        return {}

    def word(fmt: Format | None) -> str | None:
        return None if fmt is None else spec_text(fmt)

    return {"attention": {"products": word(formats.products), "kv_cache": word(formats.kv_cache)}}


def read_attention(entry: Any) -> AttentionFormats | None:
    """Read the entry back.

    Raises:
        CheckpointError: it is not as :func:`attention_entry` writes it.
    """
    if entry is None:
        return None
    problem = f"quantization_config: attention {entry!r} must name formats (or null) for products and kv_cache"
    if not isinstance(entry, Mapping):
        raise CheckpointError(problem)
    words = dict(cast("Mapping[str, Any]", entry))
    if set(words) != {"products", "kv_cache"} or not all(
        word is None or isinstance(word, str) for word in words.values()
    ):
        raise CheckpointError(problem)
    try:
        return AttentionFormats(
            products=parse_attention(words["products"]), kv_cache=parse_attention(words["kv_cache"])
        )
    except FormatError as error:
        raise CheckpointError(f"{problem}: {error}") from None
