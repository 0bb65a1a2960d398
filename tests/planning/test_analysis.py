"""analyze_model: moments, massive values, errors, recommendations; the model stays as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from measured_models import TEXT_WINDOWS, analyze
from microscale.calibration.cache import ActivationStore
from microscale.errors import ModelError
from small_models import logits


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
    logits(model, TEXT_WINDOWS)
    handle.remove()
    facts, wanted = found[name].inputs, seen[0].double()
    assert facts is not None and facts.rows == 120
    assert facts.maximum == pytest.approx(float(wanted.max()), rel=1e-4)
    assert facts.std == pytest.approx(float(wanted.std(unbiased=False)), rel=1e-4)


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
        states = model(input_ids=TEXT_WINDOWS, use_cache=False, output_hidden_states=True).hidden_states
    first, head = found["model.layers.1.input_layernorm"].inputs, found["lm_head"].inputs
    assert first is not None and first.maximum == pytest.approx(float(states[1].max()), rel=1e-4)
    assert first.std == pytest.approx(float(states[1].double().std(unbiased=False)), rel=1e-4)
    assert head is not None and head.std == pytest.approx(float(states[2].double().std(unbiased=False)), rel=1e-4)
    error = found["lm_head"].errors["mxfp4"].output_error
    assert error is not None and 0 < error < 0.1
