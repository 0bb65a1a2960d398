"""analyze_model: moments, massive values, errors, recommendations; the model stays as it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from microscale.errors import ModelError
from microscale.kernels import fake_quantize
from microscale.planning import ModelAnalysis, analyze_model, parse_candidates
from microscale.planning.recommendation import qsnr, recommend
from microscale.planning.tensor_facts import LargestValues, weight_facts
from microscale.recipes import Calibration
from small_models import logits, save_random_model

WINDOWS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(3))
FORMATS = parse_candidates("mxfp4,mxfp6_e2m3,mxfp8/none")


def analyze(model: Any) -> ModelAnalysis:
    calibration = Calibration(windows=WINDOWS, is_sequential=False)
    return analyze_model(model, FORMATS, calibration, progress=lambda done, total, label: None)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


def test_a_whole_model_and_it_stays(path: Path) -> None:
    model = microscale.load(path)
    before, dtypes = logits(model), {parameter.dtype for parameter in model.parameters()}
    found = analyze(model)
    assert torch.equal(logits(model), before) and {parameter.dtype for parameter in model.parameters()} == dtypes
    assert all(parameter.requires_grad for parameter in model.parameters())
    roles = [layer.role for layer in found.layers]
    assert roles.count("attention.qkv") == 6 and roles.count("mlp.down") == 2
    assert {"lm_head", "embedding", "norm"} < set(roles) and found.num_tokens == 120
    for layer in found.layers:
        assert (layer.inputs is None) == (layer.role in ("lm_head", "embedding", "norm"))
        if layer.inputs is not None:
            four, six = layer.errors["mxfp4"], layer.errors["mxfp6_e2m3"]
            assert four.output_error is not None and six.output_error is not None
            assert four.output_error > six.output_error > 0
            assert layer.errors["mxfp8/none"].input_qsnr_db is None
    bits = [point.bits for point in found.curve]
    assert bits == sorted(bits) and len(bits) == 3
    classes = {(one.role, one.side) for one in found.recommendations}
    assert ("mlp.down", "inputs") in classes and ("embedding", "weights") in classes
    assert all(abs(sum(one.shares) - 1) < 1e-3 for one in found.histograms)


def test_inputs_are_those_of_the_unquantized_model(path: Path) -> None:
    model = microscale.load(path, dtype=torch.float32)
    found = {layer.name: layer for layer in analyze(model).layers}
    name, seen = "model.layers.1.mlp.down_proj", list[torch.Tensor]()
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits(model, WINDOWS)
    handle.remove()
    facts, wanted = found[name].inputs, seen[0].double()
    assert facts is not None and facts.rows == 120
    assert facts.maximum == pytest.approx(float(wanted.max()), rel=1e-4)
    assert facts.std == pytest.approx(float(wanted.std(unbiased=False)), rel=1e-4)


def test_moments_are_those_of_all_numbers() -> None:
    values = torch.randn(300, 48, generator=torch.Generator().manual_seed(0)).exp()
    values[:, 7] *= 30
    facts = weight_facts(values, "w")
    centred = values.double() - values.double().mean()
    std = float(centred.square().mean().sqrt())
    assert (facts.mean, facts.std) == (pytest.approx(float(values.mean()), rel=1e-4), pytest.approx(std, rel=1e-4))
    assert facts.skewness == pytest.approx(float((centred**3).mean()) / std**3, rel=1e-3)
    assert facts.kurtosis == pytest.approx(float((centred**4).mean()) / std**4, rel=1e-3)
    assert facts.outlier_channels == (7,) and facts.percentiles[100.0] == float(values.max())


def test_massive_values_have_a_place() -> None:
    values = torch.ones(2, 6, 5)
    values[1, 3, 2] = -5000.0
    largest = LargestValues(count=2)
    largest.update(values)
    one = largest.values[0]
    assert (one.row, one.channel, one.value) == (3, 2, -5000.0)
    found = weight_facts(values[1], "w").massive
    assert [(one.row, one.channel) for one in found] == [(3, 2)]


def test_zeros_and_constants() -> None:
    facts = weight_facts(torch.zeros(4, 32), "w")
    assert (facts.std, facts.kurtosis, facts.crest_mean, facts.massive) == (0.0, 0.0, 0.0, ())
    assert weight_facts(torch.full((32,), 2.0), "norm").skewness == 0.0


def test_recommendations_follow_the_numbers() -> None:
    normal = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    words = {"role": "mlp.down", "side": "inputs", "crest": 2.3, "kurtosis": 3.0, "outliers": 0}
    narrow = recommend(normal, **words, target_db=18.0)
    wide = recommend(normal, **words, target_db=25.0)
    best = recommend(normal, **words, target_db=119.0)
    assert narrow.bits < 4.6 and 6 < wide.bits < 7 and "no format tried reaches 119 dB" in best.reason
    assert narrow.qsnr_db >= 18 and str(narrow.format) in narrow.reason
    assert narrow.qsnr_db == pytest.approx(qsnr(normal, fake_quantize(normal, narrow.format)))
    assert 1 + narrow.exponent_bits + narrow.mantissa_bits == 4


def test_qsnr() -> None:
    ones = torch.ones(2, 2)
    assert qsnr(ones, ones) == math.inf and qsnr(ones, ones * 1.1) == pytest.approx(20.0, abs=1e-4)


def test_a_quantized_model_is_refused(path: Path) -> None:
    with pytest.raises(ModelError, match="quantized already"):
        analyze(microscale.quantize(microscale.load(path), "mxfp4"))
