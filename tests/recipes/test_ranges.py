"""Calibration of static ranges on a whole model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microscale
from microscale.calibration.windows import calibration_windows
from microscale.errors import CalibrationError, NonFiniteError
from microscale.nn.activation import ActivationQuantizer
from microscale.recipes.ranges import calibrate_ranges, has_static_ranges
from small_models import save_random_model

TEXT = [(7 * place * place + place) % 256 for place in range(2000)]


def quantized(path: Path, activations: str | None = "nvfp4@static", rules: tuple[str, ...] = ()) -> Any:
    return microscale.quantize(save_random_model(path), "nvfp4", activations=activations, rules=rules)


def windows(samples: int = 6) -> Tensor:
    return calibration_windows(TEXT, samples=samples, window=32, bos=256)


def ranges_of(model: nn.Module) -> dict[str, float]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, ActivationQuantizer)}
    return {name.removesuffix(".activations"): float(m.amax) for name, m in found.items() if m.amax is not None}


def test_minmax_is_the_largest_input_of_each_layer(tmp_path: Path) -> None:
    model = quantized(tmp_path / "m")
    largest: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            largest[name] = max(largest.get(name, 0.0), float(args[0].abs().max()))

        return hook

    reference = quantized(tmp_path / "r", None)
    for name in ranges_of(model):
        reference.get_submodule(name).register_forward_pre_hook(note(name))
    with torch.inference_mode():
        reference(windows())
    seen: list[tuple[int, int]] = []
    report = calibrate_ranges(
        model, windows(), "minmax", batch=4, progress=lambda done, total: seen.append((done, total))
    )
    assert report.ranges == ranges_of(model) == largest
    assert len(largest) == 14 and report.unseen == () and seen == [(4, 6), (6, 6)]
    with torch.inference_mode():
        assert bool(torch.isfinite(model(windows(1)).logits).all())


@pytest.mark.parametrize("word", ["percentile(99)", "ema", "window(1)", "mse", "least_squares"])
def test_every_observer_fills_all_ranges_and_they_last(word: str, tmp_path: Path) -> None:
    model = quantized(tmp_path / "m")
    largest = calibrate_ranges(model, windows(), "minmax").ranges
    ranges = calibrate_ranges(model, windows(), word).ranges
    assert ranges != largest and all(0 < ranges[name] <= largest[name] * (1 + 1e-6) for name in largest)
    microscale.save(model, tmp_path / "out")
    assert ranges_of(microscale.load(tmp_path / "out")) == pytest.approx(ranges, rel=1e-6)


def test_kl_suits_a_scale_for_the_whole_tensor(tmp_path: Path) -> None:
    model = quantized(tmp_path / "m", "e4m3/tensor:fp32@static")
    assert all(value > 0 for value in calibrate_ranges(model, windows(), "kl").ranges.values())
    with pytest.raises(CalibrationError, match="observer kl compares histograms"):
        calibrate_ranges(quantized(tmp_path / "n"), windows(), "kl")


def test_only_static_layers_are_touched(tmp_path: Path) -> None:
    model = quantized(tmp_path / "m", "mxfp4", rules=("*.down_proj=nvfp4/nvfp4@static",))
    report = calibrate_ranges(model, windows())
    assert sorted(report.ranges) == [f"model.layers.{place}.mlp.down_proj" for place in (0, 1)]


def test_layers_that_no_token_reaches_are_named(tmp_path: Path) -> None:
    model = quantized(tmp_path / "m")
    report = calibrate_ranges(
        model, windows(), forward=lambda ids: model.model.layers[0].mlp.gate_proj(ids[:, :1] * 0.0 + torch.ones(64))
    )
    assert list(report.ranges) == ["model.layers.0.mlp.gate_proj"] and len(report.unseen) == 13
    assert math.isnan(float(model.model.layers[1].mlp.up_proj.activations.amax))


def test_ranges_of_few_tokens_are_named(tmp_path: Path) -> None:
    model = quantized(tmp_path / "m")
    report = calibrate_ranges(model, windows()[:1, :9])
    assert set(report.few.values()) == {9} and report.few.keys() == report.ranges.keys()
    assert calibrate_ranges(model, windows()[:1, :16]).few == {}


def test_nothing_to_calibrate(tmp_path: Path) -> None:
    model = quantized(tmp_path / "m", "mxfp4")
    assert not has_static_ranges(model)
    with pytest.raises(CalibrationError, match="no layer has a static range"):
        calibrate_ranges(model, windows())


def test_nan_names_the_layer_and_leaves_the_model_usable(tmp_path: Path) -> None:
    model = quantized(tmp_path / "m")
    before = calibrate_ranges(model, windows()).ranges
    model.model.layers[1].input_layernorm.weight.data[3] = math.nan
    with pytest.raises(NonFiniteError, match=r"input of model\.layers\.1\.self_attn\.q_proj holds 128 NaN"):
        calibrate_ranges(model, windows())
    assert ranges_of(model) == before
    assert all(m.observer is None for m in model.modules() if isinstance(m, ActivationQuantizer))
