"""explain: what the dispatcher would answer to each layer, before anything runs, and the same from headers alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from command_line import succeed
from microscale.errors import OptionError
from microscale.kernels import Backend, Operation, add_backend, count_executions, remove_backend
from microscale.kernels.cpu import BACKEND as CPU
from microscale.kernels.reference import BACKEND as REFERENCE
from microscale.planning.explain import Explanation, PassedOver
from small_models import logits, save_random_model

NUM_LAYERS = 14


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("explain") / "original")


@pytest.fixture(scope="module")
def stored(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MXFP4 with inputs rounded, in the layout of compressed-tensors, which has a scale rule of its own."""
    path = tmp_path_factory.mktemp("explain") / "stored"
    succeed("quantize", original, "-f", "mxfp4", "-a", "mxfp4", "-o", path)
    return path


def packed(found: Explanation) -> list[Any]:
    return [layer for layer in found.layers if layer.layout is not None]


def test_it_says_what_runs(original: Path) -> None:
    model = microscale.quantize(original, "mxfp4", activations="mxfp8")
    found = microscale.explain(model)
    with count_executions() as counts:
        logits(model)
    said = {(Operation.LINEAR, layer.backend) for layer in packed(found)}
    assert said == set(counts) and len(packed(found)) == NUM_LAYERS == sum(counts.values())
    assert [layer.layer for layer in found.layers if layer.layout is None] == ["model.embed_tokens", "lm_head"]
    first = packed(found)[0]
    assert (first.engine, first.device, found.obstacle) == ("transformers", "cpu", None)
    assert first.executed.weights == "mxfp4" and first.executed.activations == "mxfp8_e4m3"
    assert first.requested.activations == "mxfp8" and first.reason is None, "two words for one format are no difference"
    if CPU.unavailable() is None:
        assert (first.backend, first.layout, first.level) == ("cpu", "rows16", CPU.level())
        assert first.kernel == "linear, inputs rounded to floats" and first.passed_over == ()


def test_headers_are_enough_and_give_what_the_loaded_model_gives(stored: Path, original: Path) -> None:
    from_headers, loaded = microscale.explain(stored), microscale.explain(microscale.load(stored))
    assert from_headers == dataclasses.replace(loaded, why_not_decoder=from_headers.why_not_decoder)
    assert microscale.explain(original).layers[1].backend == "torch"


def test_requested_and_executed_inputs_differ_under_the_rule_of_a_layout(original: Path, stored: Path) -> None:
    model = microscale.quantize(original, "mxfp4", activations="mxfp4", layout="compressed-tensors")
    for found in (microscale.explain(stored), microscale.explain(model)):
        for layer in packed(found):
            assert (layer.requested.activations, layer.executed.activations) == ("mxfp4", "mxfp4:even")
            assert layer.reason is not None and "compressed-tensors fixes the scale rule" in layer.reason
    exact = microscale.quantize(original, "mxfp4", activations="mxfp4")
    assert {layer.reason for layer in microscale.explain(exact).layers} == {None}


@pytest.mark.skipif(CPU.unavailable() is not None, reason="needs the compiled kernels")
def test_a_gradient_that_is_asked_for_is_named(original: Path) -> None:
    model = microscale.quantize(original, "mxfp4", activations="mxfp4")
    model.get_input_embeddings().weight.requires_grad_(True)
    found = microscale.explain(model)
    assert {layer.backend for layer in packed(found)} == {"cpu"}
    for layer in packed(found):
        assert layer.reason is not None and layer.reason.startswith("this holds without gradients: model.embed_tokens")
        assert "the reference path in torch runs it" in layer.reason
    assert {layer.reason for layer in found.layers if layer.layout is None} == {None}
    with count_executions() as counts, torch.enable_grad():
        model(torch.arange(4).reshape(1, 4))
    assert set(counts) == {(Operation.LINEAR, "reference")}


def test_another_device_is_explained_where_there_is_none(stored: Path) -> None:
    found = microscale.explain(stored, device="cuda")
    first = packed(found)[0]
    assert (first.backend, first.layout, first.device) == ("reference", "row_major", "cuda")
    assert (
        PassedOver(backend="cpu", reason=CPU.unavailable() or "runs on the CPU only, not on cuda") in first.passed_over
    )
    assert (found.obstacle is None) == torch.cuda.is_available()


@pytest.mark.skipif(CPU.unavailable() is not None, reason="without compiled kernels that is the reason")
@pytest.mark.parametrize(
    ("weights", "activations", "cause"),
    [
        ("mxfp4", "e4m3/128x128:fp32", "cannot round its input on the fly: "),
        ("mxfp4", "e4m3/tensor:fp32", "cannot round its input on the fly: "),
        ("mxfp4", "adaptive_2_4", "adaptive_2_4 chooses among all numbers of a tensor"),
        ("e2m1/24:e8m0", None, "blocks have 16 or a multiple of 32 elements in it, not 24"),
        ("e4m3/128x128:fp32", None, "it needs blocks along the last axis, or one for each row"),
    ],
)
def test_the_cause_is_told_and_not_the_layout_that_follows_from_it(
    original: Path, weights: str, activations: str | None, cause: str
) -> None:
    found = packed(microscale.explain(microscale.quantize(original, weights, activations=activations)))
    for layer in found:
        assert (layer.backend, layer.layout) == ("reference", "row_major")
        (other,) = layer.passed_over
        assert other.backend == "cpu" and cause in other.reason and "not row_major" not in other.reason


def test_a_backend_that_is_added_shows_with_its_level(original: Path, stored: Path) -> None:
    toy = Backend(
        name="toy",
        title="toy kernels",
        rank=1,
        implementations={Operation.LINEAR: REFERENCE.implementations[Operation.LINEAR]},
        why_not=lambda request: "keeps its inputs as they are" if request.activations is not None else None,
        level=lambda: "toy level 7",
        describe=lambda request: "played",
    )
    add_backend(toy)
    try:
        plain = packed(microscale.explain(microscale.quantize(original, "mxfp4")))[0]
        rounded = packed(microscale.explain(stored))[0]
    finally:
        remove_backend("toy")
    assert (plain.backend, plain.level, plain.kernel) == ("toy", "toy level 7", "linear, played")
    assert PassedOver(backend="toy", reason="keeps its inputs as they are") in rounded.passed_over


def test_what_cannot_be_explained() -> None:
    with pytest.raises(OptionError, match=r"model is a directory or hub name .* got 3"):
        microscale.explain(3)


def test_the_command_prints_equal_layers_once(stored: Path) -> None:
    lines = succeed("explain", stored).stdout
    assert "14 layers such as model.layers.0.self_attn.q_proj: linear" in lines
    assert "asked for weights mxfp4, inputs mxfp4: the layout compressed-tensors" in lines
    assert "not cpu: " in succeed("explain", stored, "--device", "cuda").stdout
    assert "model.layers.1.mlp.down_proj" in succeed("explain", stored, "--layers").stdout


def test_the_json_has_every_layer(stored: Path) -> None:
    found = succeed("explain", stored, "--json").json
    assert found["layers"][1]["executed"] == {"weights": "mxfp4", "activations": "mxfp4:even"}
    expected = [dataclasses.asdict(layer) for layer in microscale.explain(stored).layers]
    assert [layer["layer"] for layer in found["layers"]] == [layer["layer"] for layer in expected]
    assert set(found["layers"][0]) == set(expected[0])
