"""Whole models through chains of steps: every named method, on families with and without folds, biases and experts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import microscale
from family_models import family_model
from microscale.algorithms.registry import METHODS
from microscale.errors import CalibrationError, ModelError, NonFiniteError
from microscale.integrations.saving import mark_quantized
from microscale.nn.linear import QuantizedLinear
from microscale.recipes.apply import quantize_model, set_activations
from microscale.recipes.calibrated import Calibration
from microscale.recipes.recipe import make_recipe
from small_models import same_tensors

# Options that keep a method to a second on a tiny model; the rest is the default.
QUICK = {
    "qad": "rule+distill:epochs=1+rtn",
    "autoround": "autoround:steps=8+rtn",
    "omniquant": "omniquant:epochs=2+rtn",
    "flatquant": "flatquant:epochs=2+rtn",
    "batquant": "batquant:epochs=2+gptq",
    "spinquant": "spinquant:steps=3+gptq",
}
WINDOWS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1))


@functools.cache
def exact_logits(family: str) -> Tensor:
    return run(family_model(family, dtype=torch.float32))


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=WINDOWS, use_cache=False).logits


def quantized(family: str, method: str, *, fmt: str = "mxfp4", activations: str | None = None, **changes: Any) -> Any:
    model = family_model(family, dtype=torch.float32)
    recipe = make_recipe(format=fmt, activations=activations, method=QUICK.get(method, method))
    quantize_model(model, recipe, calibration=Calibration(windows=WINDOWS, batch=2, **changes))
    return model


def state(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_model(method: str, family: str) -> None:
    model = quantized(family, method, activations="mxfp4")
    found = run(model)
    assert bool(torch.isfinite(found).all())
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == (14 if family == "llama" else 12)
    error = float((found - exact_logits(family)).square().mean())
    plain = float((run(quantized(family, "rtn", activations="mxfp4")) - exact_logits(family)).square().mean())
    assert error < 1.5 * plain, "a random model is no place to rank methods, but none may break it"
    assert not same_tensors(state(model), state(quantized(family, method, activations="mxfp4"))), (
        "the seed is the result"
    )


CHAINS = [
    "smoothquant",
    "awq+hadamard+rtn",
    "awq+distill:transform=none,epochs=0+rtn",
    "smoothquant+distill:epochs=0+rtn",
    "permute+hadamard:signs=true+gptq",
    "quarot+hadamard:size=16,roles=down+rtn",
    "spinquant:steps=1+rtn",
    "macroblock+rtn",
    "omniquant:epochs=2,clip=false+rtn",
    "flatquant:epochs=2,clip=false+rtn",
    "micromix+rtn",
    "awq+micromix+rtn",
    "batquant:epochs=2,clip=false+autoround:steps=2,clip=false+rtn",
]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("family", ["llama", "llama-biases-tied", "opt", "gpt2", "qwen3"])
def test_folds_and_transforms_leave_the_function_as_it_was(chain: str, family: str) -> None:
    """Methods work for inputs of 4 bits and weights with next to no rounding; then the inputs are left alone."""
    model = quantized(family, chain, fmt="fp16/32:e8m0", activations="mxfp4")
    set_activations(model, None)
    expected = exact_logits(family)
    assert float((run(model) - expected).abs().max() / expected.abs().max()) < 3e-3


@pytest.mark.parametrize("method", ["gptq", "awq", "mr-gptq", "lowrank", "quarot", "macroblock", *QUICK])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2", "qwen3"])
def test_methods_on_other_families(method: str, family: str) -> None:
    model = quantized(family, method)
    assert bool(torch.isfinite(run(model)).all())


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_is_the_same_model(method: str, tmp_path: Path) -> None:
    model = quantized("llama-biases-tied", method, activations="mxfp8")
    mark_quantized(model)
    microscale.save(model, tmp_path / "saved", layout="microscale")
    loaded = microscale.load(tmp_path / "saved")
    assert not same_tensors(state(loaded), state(model))
    torch.testing.assert_close(run(loaded), run(model), rtol=0, atol=1e-4)  # another implementation of attention


def test_calibration_is_asked_for_by_name() -> None:
    model = family_model("llama", dtype=torch.float32)
    with pytest.raises(CalibrationError, match=r"gptq.*--calibration"):
        quantize_model(model, make_recipe(format="mxfp4", method="gptq"))


def test_nan_in_the_activations_is_named() -> None:
    model = family_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[int(WINDOWS[0, 0])] = torch.nan
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        quantize_model(model, make_recipe(format="mxfp4", method="gptq"), calibration=Calibration(windows=WINDOWS))


@pytest.mark.parametrize("method", ["quarot", "spinquant"])
@pytest.mark.parametrize("family", ["gemma2", "opt-after"])
def test_a_residual_stream_that_cannot_be_rotated_is_refused(method: str, family: str) -> None:
    model = family_model(family, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in state(model).items()}
    with pytest.raises(ModelError, match="cannot be rotated"):
        recipe = make_recipe(format="mxfp4", method=QUICK.get(method, method))
        quantize_model(model, recipe, calibration=Calibration(windows=WINDOWS))
    assert not same_tensors(before, state(model)), "nothing was changed"
