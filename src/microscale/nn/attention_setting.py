"""What a model's attention is rounded to: the record, its words, its place on a module and in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

from torch import nn

from microscale.errors import CheckpointError, FormatError
from microscale.formats import (
    ActivationSpec,
    Format,
    RangeKind,
    SegmentedFormat,
    Written,
    format_name,
    parse_activation,
    spec_text,
)

Word = str | Written[Any] | Format | ActivationSpec | None
"""What a side is rounded to, as a user gives it; None where nothing was said."""


class FileScales(Enum):
    """Keys and values are rounded as a checkpoint says: by one scale for a tensor or for each head, which it holds."""

    E4M3 = "e4m3"
    INT8 = "int8"

    def __str__(self) -> str:
        return f"{self.value} by the scales of the file"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFormats:
    """What attention is rounded to; None leaves a side as it is.

    ``products``: queries, keys, probabilities and values as they enter the two products. ``kv_cache``: keys and values
    as they are stored, which comes first.
    """

    products: Format | None = None
    kv_cache: Format | FileScales | None = None

    @classmethod
    def parse(cls, products: Word, kv_cache: Word, default: AttentionFormats | None = None) -> AttentionFormats:
        """Return the formats of two words; a side without a word is as in ``default``, else not rounded.

        Raises:
            FormatError: see :func:`parse_attention`.
        """
        before = default or cls()
        return cls(
            products=before.products if products is None else parse_attention(products),
            kv_cache=before.kv_cache if kv_cache is None else parse_attention(kv_cache),
        )

    @property
    def words(self) -> dict[str, str | None]:
        """Names of the formats by ``products`` and ``kv_cache``."""
        named = {"products": self.products, "kv_cache": self.kv_cache}
        return {key: None if fmt is None else _shown(fmt) for key, fmt in named.items()}

    @property
    def option_words(self) -> dict[str, str | None]:
        """Names of the formats by the options that set them."""
        return dict(zip(("attention", "kv_cache"), self.words.values(), strict=True))

    @property
    def titled(self) -> dict[str, str]:
        """Names of the formats that there are, by what a reader calls the side."""
        sides = zip(("products of attention", "KV cache"), self.words.values(), strict=True)
        return {side: word for side, word in sides if word is not None}

    def __str__(self) -> str:
        return ", ".join(f"{side} in {word}" for side, word in self.titled.items()) or "attention not rounded"


def _shown(fmt: Format | FileScales) -> str:
    return str(fmt) if isinstance(fmt, FileScales) else format_name(fmt)


NOT_ROUNDED = AttentionFormats()
"""Attention as it is."""


def parse_attention(word: Word) -> Format | None:
    """Return the format of a word; None for ``none`` or no word.

    Raises:
        FormatError: no format, segments (which belong to one width), or a range that is kept from call to call.
    """
    if isinstance(word, Written):
        word = cast("Format | ActivationSpec | None", word.record)
    if word is None or (isinstance(word, str) and word == "none"):
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
    """Return what ``quantization_config`` says about a model's attention: ``{"attention": …}``, or nothing.

    A cache that is rounded by the scales of a file is not in it.
    """
    formats = model_attention(model) or NOT_ROUNDED

    def word(fmt: Format | FileScales | None) -> str | None:
        return None if fmt is None or isinstance(fmt, FileScales) else spec_text(fmt)

    words = {"products": word(formats.products), "kv_cache": word(formats.kv_cache)}
    return {"attention": words} if any(words.values()) else {}


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
        return AttentionFormats.parse(**words)
    except FormatError as error:
        raise CheckpointError(f"{problem}: {error}") from None
