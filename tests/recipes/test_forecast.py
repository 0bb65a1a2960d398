"""What a job with calibration is told to take: from its first layer, and from one step of learning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from microscale.algorithms.pipeline import parse_method
from microscale.nn.packed import PackedModule
from microscale.recipes import calibrated, forecast
from microscale.recipes.apply import quantize_model
from microscale.recipes.calibration import Calibration
from microscale.recipes.forecast import Forecast, peak_bytes
from microscale.recipes.recipe import make_recipe
from tiny_models import tiny_model

WINDOWS = torch.randint(3, 150, (8, 16), generator=torch.Generator().manual_seed(0))


class Clock:
    """A clock by which each look takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


def forecasts(model: Any, method: str, monkeypatch: pytest.MonkeyPatch, **recipe: Any) -> list[Forecast]:
    for module in (calibrated, forecast):
        monkeypatch.setattr(module, "time", Clock())
    found: list[Forecast] = []
    calibration = None if method == "rtn" else Calibration(windows=WINDOWS, batch=4)
    words = make_recipe(format="mxfp4", activations="mxfp4", method=method, **recipe)
    quantize_model(model, words, calibration=calibration, forecast=found.append)
    return found


def test_every_layer_takes_what_the_first_took(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = forecasts(tiny_model("llama", num_hidden_layers=3), "gptq", monkeypatch)
    seconds = found.seconds / 3  # one tick from the start of the first layer to its end
    assert found.layers == 3 and seconds == 1.0 and found.learning == () and not found.is_ahead
    assert 0 < found.num_bytes <= peak_bytes() and found.device_bytes is None


def test_a_layer_counts_by_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = forecasts(
        tiny_model("llama"), "gptq", monkeypatch, exclude=("model.layers.0.mlp.*", "model.layers.0.self_attn.v_proj")
    )
    first, second = 64 * 64 * 2 + 32 * 64, 64 * 64 * 2 + 2 * 32 * 64 + 3 * 96 * 64
    assert found.seconds == pytest.approx((first + second) / first)


def test_learning_end_to_end_takes_a_step_for_each_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven of eight windows learn, twice; the step that was tried took one tick."""
    (found,) = forecasts(tiny_model("llama"), "gptq+refine:epochs=2", monkeypatch)
    assert found.learning == ("refine",) and found.learning_seconds == 14.0
    assert found.seconds == pytest.approx(14.0 + 2.0)


def test_what_comes_before_the_layers_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, found = forecasts(tiny_model("llama"), "distill:epochs=1+gptq", monkeypatch)
    assert ahead.is_ahead and ahead.learning == ("distill",) and ahead.seconds == 7.0
    assert not found.is_ahead and found.learning == () and found.seconds == 2.0


def test_without_text_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forecasts(tiny_model("llama"), "rtn", monkeypatch) == []


def test_the_trial_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    others = copy.deepcopy(model)
    forecasts(model, "gptq+refine:epochs=1", monkeypatch)
    monkeypatch.setattr(forecast.Forecaster, "_measure", lambda self, problem: None)
    forecasts(others, "gptq+refine:epochs=1", monkeypatch)
    for one, other in zip(model.modules(), others.modules(), strict=True):
        if isinstance(one, PackedModule):
            assert all(torch.equal(part, other.tensor.parts[name]) for name, part in one.tensor.parts.items())


@pytest.mark.parametrize(
    ("chain", "windows"),
    [("refine:epochs=2", 224), ("distill:epochs=0.5", 56), ("spinquant:steps=9,batch=4", 36), ("gptq", 0)],
)
def test_windows_that_a_step_learns_from(chain: str, windows: int) -> None:
    """Of 116, four are held out."""
    assert sum(step.windows_learned(116) for step in parse_method(chain).steps) == windows
