"""Find the static activation ranges of a quantized model by running calibration text through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from microscale.calibration.observers import Observer, ObserverSpec, make_observer, parse_observer
from microscale.errors import CalibrationError
from microscale.formats import ActivationSpec, RangeKind
from microscale.kernels import fake_quantize
from microscale.nn.activation import ActivationQuantizer, observe_activations
from microscale.recipes.calibration import CalibrationText
from microscale.recipes.token_counts import FEWEST_TOKENS

DEFAULT_OBSERVER = "mse"


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeReport:
    """The ranges by layer, the layers that no token reached (experts), which still have none, and how many tokens
    reached those that saw fewer than :data:`~microscale.recipes.token_counts.FEWEST_TOKENS`.
    """

    ranges: dict[str, float]
    unseen: tuple[str, ...]
    few: dict[str, int] = field(default_factory=dict[str, int])


class _Counting:
    """An observer that counts tokens too."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.num_tokens = 0

    def update(self, inputs: Float[Tensor, "..."]) -> None:
        self.num_tokens += inputs.numel() // max(1, inputs.shape[-1])
        self._observer.update(inputs)

    def amax(self) -> Float[Tensor, "1"]:
        return self._observer.amax()


def has_static_ranges(model: nn.Module) -> bool:
    """Return whether any layer waits for, or has, a static range."""
    return any(isinstance(m, ActivationQuantizer) and m.spec.range is RangeKind.STATIC for m in model.modules())


def check_observer(word: str | None, settings: Iterable[ActivationSpec | None], text: CalibrationText) -> None:
    """Refuse an observer that cannot measure the layers with these settings; None: none was named.

    Raises:
        CalibrationError: an unknown one, one that nothing would use, or one that does not fit a format.
    """
    spec = parse_observer(DEFAULT_OBSERVER if word is None else word)
    static = [setting for setting in dict.fromkeys(settings) if setting and setting.range is RangeKind.STATIC]
    if word is not None and not static:
        raise CalibrationError(
            f"observer {word} measures static ranges, and no layer has one: write the activations with @static,"
            " e.g. nvfp4@static, or leave the observer out"
        )
    if word is not None and text is CalibrationText.ABSENT:
        raise CalibrationError(
            f"observer {word} measures ranges on calibration text: give --calibration FILE (calibration=... in Python)"
        )
    for setting in static:
        make_observer(spec, fmt=setting.format, quantize=lambda rows, amax: rows)


def calibrate_ranges(
    model: nn.Module,
    windows: Int[Tensor, "samples window"],
    observer: str | ObserverSpec = DEFAULT_OBSERVER,
    *,
    forward: Callable[[Int[Tensor, "batch window"]], object] | None = None,
    batch: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RangeReport:
    """Fill the static ranges of a model's activation quantizers in place, in one pass over the windows.

    The weights are the quantized ones, the inputs of layers with a static range pass unquantized meanwhile. ``forward``
    runs a batch of windows (default: the model itself); one that computes no logits saves their memory.

    Raises:
        CalibrationError: no layer has a static range, an unknown observer, or one that does not fit a layer's format.
        NonFiniteError: NaN or Inf in a layer's input, with its name.
    """
    spec = parse_observer(observer)
    if not has_static_ranges(model):
        raise CalibrationError(
            "no layer has a static range to calibrate; quantize activations with @static, e.g. nvfp4@static"
        )

    counting: dict[str, _Counting] = {}

    def make(name: str, setting: ActivationSpec) -> Observer:
        def rounded(rows: Float[Tensor, "rows cols"], amax: Float[Tensor, "1"]) -> Float[Tensor, "rows cols"]:
            return fake_quantize(rows, setting.format, amax=amax, name=f"the input of {name}")

        made = make_observer(spec, fmt=setting.format, quantize=rounded, name=_layer_name(name), seed=seed)
        counting[_layer_name(name)] = _Counting(made)
        return counting[_layer_name(name)]

    run = model if forward is None else forward
    with torch.inference_mode(), observe_activations(model, make) as observers:
        for start in range(0, len(windows), batch):
            run(windows[start : start + batch])
            progress(min(start + batch, len(windows)), len(windows))
    ranges = {_layer_name(name): _range_of(model.get_submodule(name)) for name in observers}
    unseen = tuple(name for name, value in ranges.items() if math.isnan(value))
    return RangeReport(
        ranges={name: value for name, value in ranges.items() if not math.isnan(value)},
        unseen=unseen,
        few={name: each.num_tokens for name, each in counting.items() if 0 < each.num_tokens < FEWEST_TOKENS},
    )


def _range_of(quantizer: nn.Module) -> float:
    return float(quantizer.get_buffer("amax"))


def _layer_name(quantizer: str) -> str:
    return quantizer.removesuffix(".activations") or "the layer"
