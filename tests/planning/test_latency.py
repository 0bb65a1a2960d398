"""Times of layers: what is measured once, on which input, and what stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from microscale.formats import parse_activation
from microscale.kernels import quantize
from microscale.nn.linear import QuantizedLinear
from microscale.planning import latency
from microscale.planning.latency import measure_latencies


class Clock:
    """Every look at it is a millisecond later; a call of a layer takes ``cost`` seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(nn.Linear):
    """A linear layer that takes so many seconds of a clock, and remembers its inputs."""

    def __init__(self, clock: Clock, seconds: list[float], cols: int, rows: int) -> None:
        super().__init__(cols, rows)
        self.clock, self.seconds, self.seen = clock, iter(seconds), list[Tensor]()

    def forward(self, input: Tensor) -> Tensor:
        self.clock.now += next(self.seconds)
        self.seen.append(input)
        return input


def test_the_median_of_seven_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call to warm up, one to count by, then seven: 10 ms a call needs no more than one call a repeat."""
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    layer = Slow(clock, [9.0, 0.010, 0.011, 0.5, 0.012, 0.013, 0.001, 0.014, 0.4], 8, 4)
    assert measure_latencies({"a": [None]}, {"a": layer}, tokens=3) == {"a": [pytest.approx(13.0)]}
    assert len(layer.seen) == 9 and all(inputs.shape == (3, 8) for inputs in layer.seen)


def test_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 ms a repeat: five calls of 1 ms."""
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    layer = Slow(clock, [0.001] * (2 + 7 * 5), 8, 4)
    assert measure_latencies({"a": [None]}, {"a": layer}, tokens=1)["a"] == [pytest.approx(1.0)]
    assert next(layer.seconds, None) is None


def test_layers_of_one_shape_and_format_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Any] = []

    def count(module: nn.Module, tokens: int) -> float:
        measured.append((module, tokens))
        return float(len(measured))

    monkeypatch.setattr(latency, "_milliseconds", count)
    originals = {"a": nn.Linear(64, 32), "b": nn.Linear(64, 32), "c": nn.Linear(32, 64)}

    def packed(name: str, spec: str, activations: str | None = None) -> nn.Module:
        weight = quantize(originals[name].weight.detach(), spec)
        inputs = None if activations is None else parse_activation(activations)
        return QuantizedLinear.from_tensor(weight, activations=inputs)

    stand_ins = {
        name: [None, packed(name, "mxfp4"), packed(name, "mxfp8"), packed(name, "mxfp4", "mxfp4")] for name in originals
    }
    steps: list[tuple[int, int, str]] = []
    found = measure_latencies(stand_ins, originals, tokens=2, progress=lambda *step: steps.append(step))
    assert found == {"a": [1.0, 2.0, 3.0, 4.0], "b": [1.0, 2.0, 3.0, 4.0], "c": [5.0, 6.0, 7.0, 8.0]}
    assert steps == [(0, 3, "a"), (1, 3, "b"), (2, 3, "c"), (3, 3, "")]


@pytest.mark.parametrize(
    ("module", "shape", "dtype"),
    [
        (nn.Linear(8, 4), (5, 8), torch.float32),
        (nn.Embedding(7, 4), (5,), torch.int64),
        (Conv1D(4, 8), (5, 8), torch.float32),  # keeps its weight as [in, out]
    ],
)
def test_inputs_fit_the_layer(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert measure_latencies({"a": [None]}, {"a": module}, tokens=5)["a"][0] > 0
    assert (tuple(seen[0].shape), seen[0].dtype) == (shape, dtype)
    assert (not seen[0].dtype.is_floating_point and seen[0].max() < 7) or seen[0].dtype is torch.float32


def test_a_packed_layer_keeps_its_layout() -> None:
    layer = QuantizedLinear.from_tensor(quantize(torch.randn(64, 64), "mxfp4"))
    before = (layer.layout, {name: part.clone() for name, part in layer.tensor.parts.items()})
    measure_latencies({"a": [layer]}, {"a": nn.Linear(64, 64)}, tokens=2)
    assert layer.layout == before[0]
    assert all(torch.equal(part, before[1][name]) for name, part in layer.tensor.parts.items())
