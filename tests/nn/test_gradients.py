"""Quantized models are frozen: a plain call runs on the kernels, and a gradient that is asked for still flows."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import microscale
import microscale.hf  # pyright: ignore[reportUnusedImport]  # registers with transformers
from microscale.errors import GradientNote
from microscale.kernels import Operation, count_executions
from microscale.kernels.cpu import native
from small_models import save_random_model

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason="needs the compiled kernels")

NUM_LAYERS = 14
TOKENS = torch.arange(12).reshape(1, 12)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("gradients") / "original")


@pytest.fixture(scope="module")
def stored(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gradients") / "stored"
    microscale.save(microscale.quantize(original, "mxfp4"), path, layout="microscale")
    return path


def quantized(original: Path, stored: Path) -> Any:
    del stored
    return microscale.quantize(original, "mxfp4")


def loaded(original: Path, stored: Path) -> Any:
    del original
    return microscale.load(stored)


def from_pretrained(original: Path, stored: Path) -> Any:
    del original
    return transformers.AutoModelForCausalLM.from_pretrained(stored)


WAYS = [quantized, loaded, from_pretrained]


def backends(model: Any, **inputs: torch.Tensor) -> dict[str, int]:
    """Run a model and count the packed products of each backend."""
    with count_executions() as counts:
        model(**(inputs or {"input_ids": TOKENS}))
    return {name: number for (operation, name), number in counts.items() if operation is Operation.LINEAR}


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_call_runs_on_the_kernels(way: Callable[[Path, Path], Any], original: Path, stored: Path) -> None:
    model = way(original, stored)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends(model) == {"cpu": NUM_LAYERS}
        assert backends(model.train()) == {"cpu": NUM_LAYERS}


def test_a_gradient_of_a_parameter_flows_and_is_told_once(stored: Path) -> None:
    model = microscale.load(stored)
    table = model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.warns(GradientNote, match=r"the input of model\.layers\.0\.self_attn\.q_proj .* in place of") as told:
        assert backends(model) == {"reference": NUM_LAYERS}
        model(TOKENS).logits.sum().backward()
    assert len(told) == 1 and table.grad is not None and bool((table.grad != 0).any())
    with torch.no_grad():
        assert backends(model) == {"cpu": NUM_LAYERS}


def test_a_gradient_of_an_input_flows(stored: Path) -> None:
    model = microscale.load(stored)
    embedded = model.get_input_embeddings()(TOKENS).requires_grad_(True)
    with pytest.warns(GradientNote):
        model(inputs_embeds=embedded).logits.square().sum().backward()
    assert embedded.grad is not None and bool(torch.isfinite(embedded.grad).all()) and bool((embedded.grad != 0).any())


def test_only_the_layers_behind_run_on_the_reference(stored: Path) -> None:
    model = microscale.load(stored)
    model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    with pytest.warns(GradientNote, match=r"the input of model\.layers\.1\.self_attn\.q_proj "):
        assert backends(model) == {"cpu": 7, "reference": 7}


def test_a_bias_is_named_and_reaches_only_what_reads_it(stored: Path) -> None:
    model = microscale.load(stored)
    layer = model.model.layers[1].mlp.gate_proj
    layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
    with pytest.warns(GradientNote, match=r"the bias of model\.layers\.1\.mlp\.gate_proj ") as told:
        assert backends(model) == {"cpu": NUM_LAYERS - 2, "reference": 2}, (
            "up_proj stands behind it, and is not reached"
        )
    assert not any(f" {number} of " in str(told[0].message) for number in range(NUM_LAYERS + 1))


@pytest.mark.parametrize("activations", ["mxfp8", "nvfp4@ema(0.9)"])
def test_a_gradient_flows_through_rounded_inputs(original: Path, activations: str) -> None:
    model = microscale.quantize(original, "mxfp4", activations=activations)
    down = model.model.layers[0].mlp.down_proj
    with pytest.warns(GradientNote, match=r"the input of model\.layers\.0\.mlp\.down_proj "):
        assert down(torch.randn(3, down.in_features, requires_grad=True)).requires_grad
    norm = model.model.layers[0].post_attention_layernorm.weight.requires_grad_(True)
    assert backends(model) == {"cpu": 4, "reference": NUM_LAYERS - 4}
    model(TOKENS).logits.square().sum().backward()
    assert norm.grad is not None and bool(torch.isfinite(norm.grad).all()) and bool((norm.grad != 0).any())
    with torch.no_grad():
        assert backends(model) == {"cpu": NUM_LAYERS}


def test_nothing_is_told_where_the_gradient_changes_nothing(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "UNAVAILABLE", "not today")
    model = microscale.load(stored)
    model.get_input_embeddings().weight.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends(model) == {"reference": NUM_LAYERS}


def test_a_copy_tells_for_itself(stored: Path) -> None:
    model = microscale.load(stored)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.get_input_embeddings().weight.requires_grad_(True)
        with pytest.warns(GradientNote):
            backends(twin)
    assert backends(model) == {"cpu": NUM_LAYERS}
