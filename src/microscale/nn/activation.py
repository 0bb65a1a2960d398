"""ActivationQuantizer: quantizes a layer's input on the fly, with a dynamic, static, EMA or sliding-window range."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microscale.calibration.observers import MinMaxObserver, Observer
from microscale.errors import ModelError
from microscale.formats import ActivationSpec, RangeKind
from microscale.kernels import fake_quantize
from microscale.kernels.straight_through import straight_through
from microscale.nn.modules import KeptDtypes


class ActivationQuantizer(KeptDtypes):
    """Fake quantization of activations in any format.

    ``amax`` (float32) is the state of the ranges that have one: [1] for static and EMA, [calls] for a window; NaN
    where nothing has been seen yet. It is saved with the checkpoint, and casting the module leaves it float32. Only
    finite inputs count for EMA and window, whose update runs in every forward call, also in eval mode: the scale used
    is the one after the update. While ``observer`` is set, a static quantizer shows it the inputs and passes them on
    unquantized; see :func:`observe_activations`.
    """

    amax: Tensor | None

    def __init__(self, spec: ActivationSpec, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.observer: Observer | None = None
        state: Tensor | None = None
        if spec.num_ranges:
            state = torch.full((spec.num_ranges,), float("nan"), dtype=torch.float32, device=device)
        self.register_buffer("amax", state)

    def forward(self, inputs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the inputs rounded to the format, in their own dtype; a gradient passes as if they were not.

        Raises:
            ModelError: a static range that was never calibrated.
            NonFiniteError: NaN or Inf while a static range is being observed.
        """
        if self.observer is not None:
            self.observer.update(inputs)
            return inputs
        amax = self._range(inputs)
        return straight_through(
            inputs, lambda kept: fake_quantize(kept, self.spec.format, amax=amax, name="the layer input")
        )

    def _range(self, inputs: Tensor) -> Float[Tensor, "1"] | None:
        if self.amax is None:
            return None
        measured = _largest(inputs)
        match self.spec.range:
            case RangeKind.EMA:
                blended = self.spec.argument * self.amax + (1 - self.spec.argument) * measured
                self.amax.copy_(torch.where(torch.isnan(self.amax), measured, blended))
                return self.amax
            case RangeKind.WINDOW:
                self.amax.copy_(torch.cat([self.amax[1:], measured]))
                return self.amax.nan_to_num(0.0).amax().reshape(1)
            case _:
                if bool(torch.isnan(self.amax).any()):
                    if _AT_HAND.get():
                        return None
                    raise ModelError(
                        f"activations {self.spec} have no static range yet; run calibration text through the model"
                        " inside `with microscale.nn.observe_activations(model):`, or use @dynamic, @ema or @window"
                    )
                return self.amax

    def extra_repr(self) -> str:
        return str(self.spec)


def _largest(inputs: Tensor) -> Float[Tensor, "1"]:
    """Return the largest finite magnitude: NaN and Inf are the policies' matter and must not stay in a range."""
    magnitudes = inputs.detach().abs()
    return torch.where(torch.isfinite(magnitudes), magnitudes, 0.0).amax().to(torch.float32).reshape(1)


_AT_HAND: ContextVar[bool] = ContextVar("ranges_at_hand", default=False)


@contextmanager
def ranges_at_hand() -> Generator[None, None, None]:
    """Let static ranges that are not measured yet come from the tensor at hand: while a model is being quantized."""
    token = _AT_HAND.set(True)
    try:
        yield
    finally:
        _AT_HAND.reset(token)


ObserverFactory = Callable[[str, ActivationSpec], Observer]
"""Makes the observer of a layer from the name of its quantizer and its setting."""


def _largest_of_all(name: str, spec: ActivationSpec) -> Observer:
    return MinMaxObserver(name)


@contextmanager
def observe_activations(
    model: nn.Module, make: ObserverFactory = _largest_of_all
) -> Generator[dict[str, Observer], None, None]:
    """Find the range of every layer with a static one; inside, the inputs of those layers pass unquantized.

    Yields the observers by the dotted names of their quantizers. At the end the new ranges take the place of older
    ones; a layer that saw nothing keeps what it had, and after an error all do.
    """
    quantizers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantizer) and module.spec.range is RangeKind.STATIC
    }
    observers = {name: make(name or "the layer", quantizer.spec) for name, quantizer in quantizers.items()}
    for name, quantizer in quantizers.items():
        quantizer.observer = observers[name]
    try:
        yield observers
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
    for name, quantizer in quantizers.items():
        found = observers[name].amax()
        if quantizer.amax is not None and not bool(torch.isnan(found).any()):
            quantizer.amax.copy_(found)
