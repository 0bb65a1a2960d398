"""The ``quantization_config`` of AMD Quark: its words for our formats and rules, and which layer has which scheme.

Source: amd-quark 0.13 (QTensorConfig, QLayerConfig, QConfig) and vLLM 0.33; see :mod:`microscale.checkpoint.quark`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatch
from typing import Any, cast

import torch

from microscale.checkpoint.schema import has_bytes_of
from microscale.errors import CheckpointError
from microscale.formats import BlockFormat, FloatElement, Format, Rounding, RuleKind, ScaleRule, parse_format

LIBRARY_VERSION = "0.13"
BLOCK_SIZE = 32

RULES = {"even": ScaleRule.EVEN, "floor": ScaleRule.FLOOR, "ceil": ScaleRule.CEIL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One element type: Quark's word for it, our format with Quark's default rule, the dtype of the stored codes."""

    word: str
    base: BlockFormat
    stored: torch.dtype


class TensorUse(Enum):
    """What a tensor entry describes: weights, which are static, or activations, which are dynamic."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"


def _scheme(word: str, spec: str, stored: torch.dtype) -> Scheme:
    base = parse_format(spec)
    assert isinstance(base, BlockFormat)
    return Scheme(word=word, base=base, stored=stored)


SCHEMES = (
    _scheme("fp4", "mxfp4:even", torch.uint8),
    _scheme("fp6_e2m3", "mxfp6_e2m3:even", torch.uint8),
    _scheme("fp6_e3m2", "mxfp6_e3m2:even", torch.uint8),
    _scheme("fp8_e4m3", "mxfp8_e4m3:even", torch.float8_e4m3fn),
)


def weight_scheme(fmt: Format) -> Scheme | None:
    """Return the scheme whose tensors hold a format's codes and scales, whatever rule and rounding made them."""
    return next((scheme for scheme in SCHEMES if has_bytes_of(fmt, scheme.base)), None)


def mode_of(fmt: BlockFormat) -> str | None:
    """Return Quark's word for a scale rule, or None where it has none."""
    rule = fmt.rule
    assert isinstance(fmt.element, FloatElement)
    if rule.kind is RuleKind.EVEN and rule.arguments == (float(fmt.element.mantissa_bits),):
        return "even"
    return next((word for word, known in RULES.items() if known == rule), None)


def tensor_entry(fmt: Format, use: TensorUse) -> dict[str, Any]:
    """Return Quark's entry for a tensor; null where it has no word for a rule or rounding."""
    scheme = weight_scheme(fmt)
    assert scheme is not None and isinstance(fmt, BlockFormat)
    entry: dict[str, Any] = {
        "dtype": scheme.word,
        "is_dynamic": use is TensorUse.ACTIVATIONS,
        "qscheme": "per_group",
        "ch_axis": -1,
        "group_size": BLOCK_SIZE,
        "block_size": None,
        "symmetric": None,
        "round_method": "half_even" if fmt.rounding is Rounding.NEAREST_EVEN else None,
        "scale_type": "float",
        "zero_point_type": "int32",
        "scale_format": "e8m0",
        "scale_calculation_mode": mode_of(fmt),
        "mx_element_dtype": None,
        "observer_cls": "PerBlockMXObserver",
        "is_scale_quant": False,
    }
    if use is TensorUse.WEIGHTS and scheme.word == "fp8_e4m3":
        entry |= {
            "qscheme": "per_block",
            "group_size": None,
            "block_size": [1, BLOCK_SIZE],
            "symmetric": True,
            "scale_type": "float8_e8m0fnu",
            "observer_cls": "PerBlock2DMinMaxObserver",
        }
    return entry


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEntries:
    """The schemes of a config: by exact name, by pattern, for all linears; and the names left alone."""

    exact: Mapping[str, Any]
    patterns: Mapping[str, Any]
    fallback: Any
    exclude: Sequence[str]

    @staticmethod
    def of(config: Mapping[str, Any]) -> LayerEntries:
        """Sort the entries of a config."""
        by_layer = _mapping(config, "layer_quant_config")
        exclude = config.get("exclude") or []
        if not isinstance(exclude, list):
            raise CheckpointError(f"quark config: exclude must be a list of layer names, got {exclude!r}")
        patterns = {name: entry for name, entry in by_layer.items() if _is_pattern(name)}
        return LayerEntries(
            exact={name: entry for name, entry in by_layer.items() if name not in patterns},
            patterns=patterns,
            fallback=_mapping(config, "layer_type_quant_config").get("Linear") or config.get("global_quant_config"),
            exclude=[str(name) for name in cast("list[Any]", exclude)],
        )

    def of_layer(self, name: str) -> Mapping[str, Any]:
        """Return the entry of a layer: by name, then by the first pattern that matches, then the one of all linears."""
        if any(pattern == name or (_is_pattern(pattern) and fnmatch(name, pattern)) for pattern in self.exclude):
            raise CheckpointError(
                f"quark config excludes layer {name!r}, but the file holds scales for it; it contradicts itself"
            )
        entry = self.exact.get(name)
        if entry is None:
            entry = next((e for pattern, e in self.patterns.items() if fnmatch(name, pattern)), self.fallback)
        if not isinstance(entry, dict):
            raise CheckpointError(f"quark config has no scheme for the quantized layer {name!r}, got {entry!r}")
        return cast("dict[str, Any]", entry)


def _mapping(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = config.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise CheckpointError(f"quark config: {key} must be an object, got {found!r}")
    return cast("dict[str, Any]", found)


def _is_pattern(name: str) -> bool:
    return any(letter in name for letter in "*?[")


def _steps(algorithms: Any) -> list[dict[str, Any]]:
    """Return the algorithms of a config: a list, one object (before Quark 0.9) or null."""
    steps = cast("list[Any]", algorithms) if isinstance(algorithms, list) else [algorithms]
    return [cast("dict[str, Any]", step) for step in steps if isinstance(step, dict)]


def check_scope(config: Mapping[str, Any]) -> None:
    """Refuse what changes the numbers and what we would leave out."""
    weight_format = _mapping(config, "export").get("weight_format", "real_quantized")
    if weight_format != "real_quantized":
        raise CheckpointError(f"quark config: weight_format {weight_format!r} is not read, only 'real_quantized'")
    for step in _steps(config.get("algo_config")):
        is_online = any(step.get(key) for key in ("r3", "r4", "online_r1_rotation", "online_config"))
        if step.get("name") == "svdquant" or (step.get("name") == "rotation" and is_online):
            raise CheckpointError(
                f"quark config: {step['name']} changes activations while the model runs, which microscale does not do"
            )
    for key, meaning in (
        ("kv_cache_quant_config", "a quantized KV cache"),
        ("softmax_quant_spec", "a quantized softmax"),
    ):
        if config.get(key):
            raise CheckpointError(f"quark config: {key} asks for {meaning}, which microscale does not read")


def read_tensor_entry(name: str, entry: Any, use: TensorUse) -> tuple[Scheme, BlockFormat]:
    """Return the scheme of a weight or of activations, with the rule that the file records."""
    role = use.value
    if isinstance(entry, list) and len(cast("list[Any]", entry)) == 1:
        entry = cast("list[Any]", entry)[0]
    found = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    scheme = next((scheme for scheme in SCHEMES if scheme.word == found.get("dtype")), None)
    if scheme is None or not _is_mx(found, use):
        words = ", ".join(scheme.word for scheme in SCHEMES)
        raise CheckpointError(
            f"layer {name!r}: the {role} {entry!r} of quark are not read; microscale reads {words} with E8M0 scales for"
            f" groups of {BLOCK_SIZE} ({'static' if use is TensorUse.WEIGHTS else 'dynamic'})"
        )
    mode, rounding = found.get("scale_calculation_mode"), found.get("round_method")
    rule = RULES.get("even" if mode is None else str(mode))
    if rule is None or rounding not in (None, "half_even"):
        raise CheckpointError(
            f"layer {name!r}: scale_calculation_mode {mode!r} and round_method {rounding!r} of the {role} are not read;"
            f" possible: {', '.join(RULES)} with half_even"
        )
    return scheme, replace(scheme.base, rule=rule)


def _is_mx(entry: Mapping[str, Any], use: TensorUse) -> bool:
    is_weight = use is TensorUse.WEIGHTS
    if bool(entry.get("is_dynamic")) is is_weight:
        return False
    if entry.get("qscheme") == "per_block" and entry.get("dtype") == "fp8_e4m3" and is_weight:
        is_e8m0 = entry.get("scale_format") == "e8m0" or entry.get("scale_type") == "float8_e8m0fnu"
        return entry.get("block_size") == [1, BLOCK_SIZE] and is_e8m0
    return (
        entry.get("qscheme") == "per_group"
        and entry.get("group_size") == BLOCK_SIZE
        and entry.get("ch_axis", -1) in (-1, 1)
        and entry.get("scale_format") == "e8m0"
    )
