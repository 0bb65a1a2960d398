"""Keys and values that a checkpoint rounds by scales of its own (``kv_cache_scheme`` of compressed-tensors).

Such a file holds ``k_scale`` and ``v_scale`` for each attention. They become buffers of these modules under the same
names, are used when attention runs, and are written again with the scheme. What cannot be used (ranges measured at run
time, zero points, other codes than 8 bits) is said, and copied as it is.

Source: compressed-tensors' ``kv_cache_scheme``; :mod:`microscale.checkpoint.float_reader` has the names of other tools.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from microscale.checkpoint.float_reader import FloatReader
from microscale.checkpoint.reader import CheckpointReader
from microscale.errors import CheckpointError, ModelError, QuantizationNote
from microscale.integrations.attention import apply_attention, attention_modules
from microscale.integrations.pending import PendingTensor
from microscale.integrations.places import places_of
from microscale.nn.attention_setting import (
    NOT_ROUNDED,
    AttentionFormats,
    FileScales,
    attention_entry,
    model_attention,
    read_attention,
)

SCHEME = "kv_cache_scheme"
"""The entry of ``quantization_config``."""
KEY_SCALE, VALUE_SCALE = "k_scale", "v_scale"
_SCALES = (KEY_SCALE, VALUE_SCALE)
_NOTED, _STORED = "microscale_cache_scheme", "microscale_stored_scales"
_CODES = {("float", 8): FileScales.E4M3, ("int", 8): FileScales.INT8}
_STRATEGIES = ("tensor", "attn_head")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheScheme:
    """What a file says of keys and values: its own words, and the codes, None where we cannot round so (``reason``)."""

    words: Mapping[str, Any]
    codes: FileScales | None = None
    reason: str = ""

    @property
    def is_for_heads(self) -> bool:
        """Whether each head has a scale of its own."""
        return self.words.get("strategy") == "attn_head"


def read_scheme(entry: Any) -> CacheScheme | None:
    """Read ``kv_cache_scheme``; None where there is none.

    Raises:
        CheckpointError: it is no object.
    """
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"quantization_config: {SCHEME} must be an object or null, got {entry!r}")
    words = dict(cast("Mapping[str, Any]", entry))
    codes = _CODES.get((str(words.get("type")), cast(int, words.get("num_bits"))))
    reason = ""
    if codes is None:
        reason = f"{words.get('num_bits')} bits of type {words.get('type')}, where e4m3 and int8 are known"
    elif words.get("dynamic"):
        reason = "ranges that are measured at run time"
    elif not words.get("symmetric", True):
        reason = "zero points"
    elif words.get("strategy", "tensor") not in _STRATEGIES:
        reason = f"the strategy {words.get('strategy')!r}, where {' and '.join(_STRATEGIES)} are known"
    return CacheScheme(words=words, codes=None if reason else codes, reason=reason)


def usable_scheme(entry: Any, reader: CheckpointReader) -> CacheScheme | None:
    """Return the scheme of a file if keys and values can be rounded so; None where there is none, or with a note."""
    scheme = read_scheme(entry)
    if scheme is None:
        return None
    has_scales = any(name.endswith(f".{KEY_SCALE}") for name in reader.infos)
    reason = scheme.reason or ("" if has_scales else f"no tensor {KEY_SCALE}")
    if reason:
        warnings.warn(
            f"{reader.path} rounds keys and values by a scheme of its own ({SCHEME}) with {reason}: they stay as they"
            " are here; --kv-cache FORMAT rounds them",
            QuantizationNote,
            stacklevel=3,
        )
        return None
    return scheme


def note_scheme(model: nn.Module, words: Mapping[str, Any] | None) -> None:
    """Remember with a model the scheme of its file, to be written again."""
    if words is None:
        model.__dict__.pop(_NOTED, None)
    else:
        model.__dict__[_NOTED] = dict(words)


def rounding_entry(model: nn.Module) -> dict[str, Any]:
    """Return what ``quantization_config`` says of a model's attention and cache; see :func:`attention_entry`."""
    words = model.__dict__.get(_NOTED)
    formats = model_attention(model) or NOT_ROUNDED
    replaced = formats.kv_cache is not None and not isinstance(formats.kv_cache, FileScales)
    return attention_entry(model) | ({} if words is None or replaced else {SCHEME: words})


def read_rounding(entries: Mapping[str, Any]) -> AttentionFormats | None:
    """Return what the entries of our own layout say of attention and cache.

    Raises:
        CheckpointError: see :func:`read_attention` and :func:`read_scheme`.
    """
    formats = read_attention(entries.get("attention"))
    scheme = read_scheme(entries.get(SCHEME))
    if scheme is None or scheme.codes is None or (formats is not None and formats.kv_cache is not None):
        return formats
    return AttentionFormats(products=None if formats is None else formats.products, kv_cache=scheme.codes)


def put_scales(model: nn.Module, scheme: CacheScheme | None) -> None:
    """Give every attention of a model empty scales, for a checkpoint to fill.

    Raises:
        ModelError: its attention cannot be rounded.
    """
    if scheme is None or scheme.codes is None:
        return
    for module in attention_modules(model).values():
        heads = int(cast(Any, module).config.num_key_value_heads) if scheme.is_for_heads else 0
        shape = (heads, 1, 1) if heads else (1,)
        device = next((one.device for one in module.parameters()), None)
        for name in _SCALES:
            module.register_buffer(name, torch.empty(shape, dtype=torch.float32, device=device))


def checked_scale(name: str, scale: Tensor) -> Tensor:
    """Return a scale in float32, as [1] or [heads, 1, 1].

    Raises:
        CheckpointError: a number in it is not finite and positive.
    """
    scale = scale.to(torch.float32)
    if not scale.numel() or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CheckpointError(f"tensor {name!r} must hold finite and positive numbers; the checkpoint is damaged")
    return scale.reshape(1) if scale.numel() == 1 else scale.reshape(-1, 1, 1)


def pending_scale(reader: CheckpointReader, name: str) -> PendingTensor:
    """Return a scale of a file that is read, and checked, when transformers takes it; never in another dtype."""
    return PendingTensor(dtype=torch.float32, load=lambda dtype: checked_scale(name, reader.load(name)))


def is_scale(name: str) -> bool:
    """Whether a tensor is a scale of keys or values."""
    return name.rpartition(".")[2] in _SCALES


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredScales:
    """The scheme of a file whose weights are read as floats, and what reads its scales."""

    scheme: CacheScheme
    names: tuple[str, ...]
    load: Callable[[str], Tensor]

    def put_into(self, model: nn.Module, formats: AttentionFormats | None) -> None:
        """Round attention to ``formats``, and keys and values by the scales, from now on.

        Raises:
            ModelError: the attention of the model cannot be rounded.
            CheckpointError: an attention has no scale, or one that is no positive number.
        """
        put_scales(model, self.scheme)
        places = places_of(self.names, model, model.state_dict(keep_vars=True))
        found = {place: name for name, place in places.items() if place is not None}
        for module_name, module in attention_modules(model).items():
            for leaf in _SCALES:
                self._fill(module, leaf, f"{module_name}.{leaf}", found)
        products = None if formats is None else formats.products
        apply_attention(model, AttentionFormats(products=products, kv_cache=self.scheme.codes))
        note_scheme(model, self.scheme.words)

    def _fill(self, module: nn.Module, leaf: str, place: str, found: Mapping[str, str]) -> None:
        name, old = found.get(place), module.get_buffer(leaf)
        if name is None:
            raise CheckpointError(f"tensor {place!r} is missing in the checkpoint, which has {SCHEME}")
        scale = checked_scale(name, self.load(name)).to(old.device)
        if scale.numel() not in (1, old.numel()):
            raise CheckpointError(f"tensor {name!r} has {scale.numel()} scales; {SCHEME} wants {old.numel()}")
        module.register_buffer(leaf, scale.reshape(-1, *old.shape[1:]).expand(old.shape).contiguous())


def note_stored(model: nn.Module, reader: CheckpointReader) -> tuple[str, ...]:
    """Remember with a model of floats how its file rounds keys and values, and return the names of those scales.

    :func:`settle_cache` puts them to use.
    """
    if not isinstance(reader, FloatReader):
        return ()
    scheme = usable_scheme(reader.cache_scheme, reader)
    if scheme is None:
        return ()
    names = tuple(name for name in reader.infos if is_scale(name))
    model.__dict__[_STORED] = StoredScales(scheme=scheme, names=names, load=reader.load)
    return names


def settle_cache(model: nn.Module, formats: AttentionFormats | None) -> nn.Module:
    """Round the attention of a model from now on: to ``formats``, and its cache else as its file does; return it.

    Raises:
        ModelError: the attention cannot be rounded to ``formats``; where only the file asks for it, this is a note.
        CheckpointError: see :meth:`StoredScales.put_into`.
    """
    stored: StoredScales | None = model.__dict__.pop(_STORED, None)
    now = model_attention(model)
    before = None if now is None or not isinstance(now.kv_cache, FileScales) else now.kv_cache
    if (stored is not None or before is not None) and formats is not None and formats.kv_cache is not None:
        warnings.warn(
            f"the KV cache in {formats.words['kv_cache']} takes the place of the scales of the file",
            QuantizationNote,
            stacklevel=3,
        )
        _remove_scales(model)
    elif before is not None and formats is not None:
        formats = AttentionFormats(products=formats.products, kv_cache=before)
    elif stored is not None:
        try:
            stored.put_into(model, formats)
        except ModelError as error:
            if formats is not None:
                raise
            warnings.warn(
                f"the file rounds keys and values, which is left out: {error}", QuantizationNote, stacklevel=3
            )
        return model
    if formats is not None:
        apply_attention(model, formats)
    return model


def _remove_scales(model: nn.Module) -> None:
    note_scheme(model, None)
    for module in model.modules():
        for leaf in _SCALES:
            if leaf in dict(module.named_buffers(recurse=False)):
                delattr(module, leaf)
