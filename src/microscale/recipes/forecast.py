"""About how long a job with calibration will take, and how much memory: measured on its first steps, while it runs.

The first decoder layer is calibrated and quantized, and every other counts by its weights. For steps that learn end to
end one window makes one step of learning, whose result is thrown away. Memory is the peak of the process so far, when
model, kept inputs and statistics (and what a step of learning needs) were there; the moments of what is learned come on
top.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microscale.algorithms.contract import LayerProblem, ModelProblem, RefineStep, Step
from microscale.algorithms.distill import mean_divergence
from microscale.algorithms.pipeline import Pipeline
from microscale.algorithms.straight_through import StandIn
from microscale.families.structure import ModelStructure
from microscale.layerwise.devices import device_of, wait_for
from microscale.recipes.calibration import Calibration
from microscale.recipes.plan import PlannedLayer

BYTES_LEARNED = 8
"""Of a weight that is learned, beside itself and its gradient: two moments in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a job takes in all; ``learning`` are steps that learn end to end, ``learning_seconds`` their part of it.

    ``is_ahead``: it is the part before layers are rounded, of which nothing is known yet. ``device_bytes`` lie on the
    device where there is one.
    """

    layers: int
    seconds: float
    num_bytes: int
    device_bytes: int | None = None
    learning: tuple[str, ...] = ()
    learning_seconds: float = 0.0
    is_ahead: bool = False


Tell = Callable[[Forecast], None]


class Forecaster:
    """Tells what a job will take: before a step learns from the whole model, and after the first layer."""

    def __init__(
        self,
        model: Any,
        structure: ModelStructure,
        layers: Mapping[str, PlannedLayer],
        calibration: Calibration | None,
        tell: Tell,
    ) -> None:
        """Take a model whose planned layers are to be quantized; nothing is measured yet."""
        self._model = model
        self._layers = layers
        self._blocks = [block.name for block in structure.blocks]
        self._calibration = calibration
        self._tell = tell
        self._afterwards: list[RefineStep] = []
        self._window_seconds = 0.0
        self._learning_bytes = 0

    def begin(self, pipelines: Sequence[Pipeline], problem_of: Callable[[Sequence[Pipeline]], ModelProblem]) -> None:
        """Where steps learn end to end, see what a window takes, and tell of those steps that come before layers."""
        learning = [pipeline for pipeline in pipelines if pipeline.sees_whole]
        if not learning or self._calibration is None:
            return
        steps = dict.fromkeys(step for pipeline in learning for step in pipeline.steps)
        self._afterwards = [step for step in steps if isinstance(step, RefineStep)]
        self._measure(problem_of(learning))
        ahead = [step for step in steps if step.windows_learned(1) and step not in self._afterwards]
        if ahead:
            self._say(ahead, 0.0, is_ahead=True)

    def layer_done(self, index: int, seconds: float) -> None:
        """Tell what the job takes from here on, the layer that is done included."""
        own = self._weights_in(self._blocks[index])
        rest = sum(self._weights_in(name) for name in self._blocks[index:])
        every = seconds * rest / own if own else seconds * (len(self._blocks) - index)
        self._say(self._afterwards, every, first=index)

    def _measure(self, problem: ModelProblem) -> None:
        """Make one step of learning on one window, and throw its result away."""
        layers = [layer for group in problem.groups for layer in group.layers]
        stand_ins = {layer.name: _learning(layer, problem.biases[layer.name]) for layer in layers}
        device = problem.windows.token_ids.device
        started = time.perf_counter()
        with torch.enable_grad():
            loss = mean_divergence(problem, stand_ins, problem.windows[:1])
            if loss.requires_grad:  # a layer that no token reaches changes nothing
                loss.backward()
        wait_for(device)
        self._window_seconds = time.perf_counter() - started
        self._learning_bytes = BYTES_LEARNED * sum(_size(layer) for layer in self._layers.values())

    def _say(self, steps: Sequence[Step], seconds: float, *, first: int = 0, is_ahead: bool = False) -> None:
        count = 0 if self._calibration is None else len(self._calibration.windows)
        learning = self._window_seconds * sum(step.windows_learned(count) for step in steps)
        device, more = device_of(self._model), self._learning_bytes if steps else 0
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
        self._tell(
            Forecast(
                layers=len(self._blocks) - first,
                seconds=seconds + learning,
                num_bytes=peak_bytes() + (more if device.type == "cpu" else 0),
                device_bytes=peak + (more if device.type != "cpu" else 0) if peak else None,
                learning=tuple(step.name for step in steps),
                learning_seconds=learning,
                is_ahead=is_ahead,
            )
        )

    def _weights_in(self, block: str) -> int:
        return sum(_size(layer) for name, layer in self._layers.items() if name.startswith(f"{block}."))


def _learning(layer: LayerProblem, bias: Tensor | None) -> StandIn:
    """Return a layer whose weight could be learned."""
    layer = dataclasses.replace(layer, clip=None, offset=None, inputs=None)
    weight = layer.target.clone().requires_grad_()
    return StandIn(layer=layer, bias=bias, operands=lambda inputs: (inputs, weight))


def _size(layer: PlannedLayer) -> int:
    return layer.shape[0] * layer.shape[1]


def peak_bytes() -> int:
    """Return the largest physical memory that this process has occupied; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = [line.split() for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")]
    return int(lines[0][1]) * 1024 if lines else 0
