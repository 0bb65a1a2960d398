"""ActivationQuantizer: quantizes a layer's input on the fly, with a dynamic, static, EMA or sliding-window range."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microscale.errors import ModelError
from microscale.formats import ActivationSpec, RangeKind
from microscale.kernels import fake_quantize


class ActivationQuantizer(nn.Module):
    """Fake quantization of activations in any format.

    ``amax`` (float32) is the state of the ranges that have one: [1] for static and EMA, [calls] for a window; NaN
    where nothing has been seen yet. It is saved with the checkpoint, and casting the module leaves it float32. Only
    finite inputs count. The update of EMA and window runs in every
    forward call, also in eval mode: the scale used is the one after the update.
    """

    amax: Tensor | None

    def __init__(self, spec: ActivationSpec, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.is_observing = False
        state: Tensor | None = None
        if spec.num_ranges:
            state = torch.full((spec.num_ranges,), float("nan"), dtype=torch.float32, device=device)
        self.register_buffer("amax", state)

    def forward(self, inputs: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the inputs rounded to the format, in their own dtype.

        Raises:
            ModelError: a static range that was never calibrated.
        """
        if self.is_observing and self.spec.range is RangeKind.STATIC:
            self._observe(inputs)
            return inputs
        return fake_quantize(inputs, self.spec.format, amax=self._range(inputs), name="the layer input")

    def _observe(self, inputs: Tensor) -> None:
        assert self.amax is not None
        self.amax.copy_(torch.fmax(self.amax, _largest(inputs)))

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
                    raise ModelError(
                        f"activations {self.spec} have no static range yet; run calibration text through the model"
                        " inside `with microscale.nn.observe_activations(model):`, or use @dynamic, @ema or @window"
                    )
                return self.amax

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ActivationQuantizer:
        before = self.amax
        super()._apply(fn, recurse)
        if before is not None and self.amax is not None and self.amax.dtype != before.dtype:
            self.amax = before.to(self.amax.device)
        return self

    def extra_repr(self) -> str:
        return str(self.spec)


def _largest(inputs: Tensor) -> Float[Tensor, "1"]:
    """Return the largest finite magnitude: NaN and Inf are the policies' matter and must not stay in a range."""
    magnitudes = inputs.detach().abs()
    return torch.where(torch.isfinite(magnitudes), magnitudes, 0.0).amax().to(torch.float32).reshape(1)


@contextmanager
def observe_activations(model: nn.Module) -> Generator[None, None, None]:
    """Record the largest input of every layer with a static range; inside, inputs pass unquantized."""
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.is_observing = True
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.is_observing = False
