"""analyze_model: moments, massive values, errors, recommendations; the model stays as it is."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from microscale.calibration import ActivationStore
from microscale.errors import ModelError
from microscale.kernels import fake_quantize
from microscale.nn import unstack_experts
from microscale.planning import ModelAnalysis, analyze_model, parse_candidates
from microscale.planning.recommendation import qsnr, recommend
from microscale.planning.tensor_facts import LargestValues, weight_facts
from microscale.recipes import Calibration
from small_models import logits, save_random_model

WINDOWS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(3))
FORMATS = parse_candidates("mxfp4,mxfp6_e2m3,mxfp8/none")


def analyze(model: Any, gradients: ActivationStore | None = None, source: Any = None) -> ModelAnalysis:
    calibration = Calibration(windows=WINDOWS, is_sequential=False)
    return analyze_model(
        model, FORMATS, calibration, source=source, gradients=gradients, progress=lambda done, total, label: None
    )


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
        assert (layer.inputs is None) == (layer.role == "embedding")
        assert layer.output_gradients is None and layer.weight_gradients is None
        if layer.inputs is not None and layer.role != "norm":
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
    narrow = recommend([normal], **words, target_db=18.0)
    wide = recommend([normal], **words, target_db=25.0)
    best = recommend([normal], **words, target_db=119.0)
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


class _OneByOne:
    """Reads decoder layers from a whole model, and remembers which."""

    def __init__(self, whole: Any) -> None:
        self.whole = whole
        self.read_names: list[str] = []
        self.names = ("model.layers.0", "model.layers.1")

    def read(self, name: str) -> Any:
        self.read_names.append(name)
        return copy.deepcopy(self.whole.get_submodule(name))


def without_layers(model: Any, names: tuple[str, ...]) -> Any:
    for name in names:
        model.get_submodule(name).to("meta")
    return model


@pytest.mark.parametrize("gradients", [False, True])
def test_layers_read_one_by_one_give_the_same(path: Path, gradients: bool, tmp_path: Path) -> None:
    source = _OneByOne(microscale.load(path))
    partial = without_layers(microscale.load(path), source.names)
    wanted = analyze(source.whole, ActivationStore(None, "memory") if gradients else None)
    found = analyze(partial, ActivationStore(tmp_path, "disk") if gradients else None, source)
    assert found == wanted
    assert all(parameter.is_meta for parameter in partial.model.layers.parameters())
    assert {parameter.dtype for parameter in partial.parameters()} == {torch.bfloat16}
    assert source.read_names[-1] == ("model.layers.0" if gradients else "model.layers.1")


def test_inputs_of_norms_are_the_residual_stream(path: Path) -> None:
    model = microscale.load(path, dtype=torch.float32)
    found = {layer.name: layer for layer in analyze(model).layers}
    with torch.no_grad():
        states = model(input_ids=WINDOWS, use_cache=False, output_hidden_states=True).hidden_states
    first, head = found["model.layers.1.input_layernorm"].inputs, found["lm_head"].inputs
    assert first is not None and first.maximum == pytest.approx(float(states[1].max()), rel=1e-4)
    assert first.std == pytest.approx(float(states[1].double().std(unbiased=False)), rel=1e-4)
    assert head is not None and head.std == pytest.approx(float(states[2].double().std(unbiased=False)), rel=1e-4)
    error = found["lm_head"].errors["mxfp4"].output_error
    assert error is not None and 0 < error < 0.1


def test_gradients_are_those_of_autograd(path: Path) -> None:
    model = microscale.load(path, dtype=torch.float32)
    found = {layer.name: layer for layer in analyze(model, ActivationStore(None, "gradients")).layers}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    name, seen = "model.layers.0.mlp.down_proj", list[torch.Tensor]()

    def watch(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(seen.append)

    handle = model.get_submodule(name).register_forward_hook(watch)
    scores = model(input_ids=WINDOWS, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), WINDOWS[:, 1:].flatten()).backward()
    handle.remove()
    facts = found[name].output_gradients
    assert facts is not None and facts.rows == 120
    assert facts.std == pytest.approx(float(seen[0].double().std(unbiased=False)), rel=1e-3)
    assert facts.maximum == pytest.approx(float(seen[0].max()), rel=1e-3)
    assert found[name].errors["mxfp4"].gradient_qsnr_db is not None
    assert found[name].errors["mxfp8/none"].gradient_qsnr_db is None
    for part in (name, "model.layers.1.self_attn.q_proj", "model.layers.0.input_layernorm", "model.norm", "lm_head"):
        own, wanted = found[part].weight_gradients, model.get_submodule(part).weight.grad.double()
        assert own is not None
        assert own.minimum == pytest.approx(float(wanted.min()), rel=1e-3), part
        assert own.std == pytest.approx(float(wanted.std(unbiased=False)), rel=1e-3), part
    embedding = found["model.embed_tokens"].weight_gradients
    assert embedding is not None
    assert embedding.maximum == pytest.approx(float(model.model.embed_tokens.weight.grad.max()), rel=1e-3)


def test_gradients_of_other_families(tmp_path: Path) -> None:
    for family in ("gpt2", "gemma3_text", "qwen3_moe"):
        model = microscale.load(save_random_model(tmp_path / family, family))
        unstack_experts(model)
        found = analyze(model, ActivationStore(None, "gradients"))
        assert not [layer.name for layer in found.layers if layer.role == "norm" and layer.inputs is None], family
        embedding = next(layer for layer in found.layers if layer.role == "embedding")
        assert embedding.weight_gradients is not None and embedding.weight_gradients.std > 0, family
        sides = {(one.role, one.side) for one in found.recommendations}
        assert ("attention.out", "output gradients") in sides and ("attention.out", "weight gradients") in sides


def test_a_place_that_all_windows_share_is_told_once() -> None:
    values = torch.ones(4, 6, 5)
    values[:, 0, 2] = torch.tensor([-5000.0, -6000.0, -4000.0, 3.0])
    largest = LargestValues(count=1)
    largest.update(values[:2])
    largest.update(values[2:])
    one = largest.values[0]
    assert (one.row, one.channel, one.value, one.window, one.windows) == (0, 2, -6000.0, 1, 4)


def test_a_scale_of_the_tensor_is_taken_from_each_tensor() -> None:
    normal = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    words = {"role": "mlp.down", "side": "inputs", "crest": 2.3, "kurtosis": 3.0, "outliers": 0}
    alone = recommend([normal * 1e-6], **words, target_db=20.0)
    beside = recommend([normal * 1e-6, normal * 1e6], **words, target_db=20.0)
    assert alone.format == beside.format and alone.scale == "e4m3+fp32" and alone.bits == 4.5
    assert beside.qsnr_db == pytest.approx(alone.qsnr_db, abs=0.1)


def test_every_tensor_weighs_the_same() -> None:
    normal = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    words = {"role": "mlp.down", "side": "inputs", "crest": 2.3, "kurtosis": 3.0, "outliers": 0}
    exact = torch.ones(12, 64) * 1024  # no format loses anything of it
    assert recommend([exact], **words, target_db=119.0).qsnr_db == math.inf
    both = recommend([exact, normal], **words, target_db=15.0)
    halved = qsnr(normal, fake_quantize(normal, both.format)) + 10 * math.log10(2)
    assert both.qsnr_db == pytest.approx(halved, abs=1e-3)
