"""Activation ranges, with numbers worked out by hand: dynamic, static, moving average, window."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microscale.calibration.observers import Observer, make_observer
from microscale.errors import ModelError, NonFiniteError
from microscale.formats import ActivationSpec, parse_activation
from microscale.kernels import fake_quantize, quantize
from microscale.nn.activation import ActivationQuantizer, observe_activations
from microscale.nn.linear import QuantizedLinear
from small_models import same_bits

INT8 = "int8-f0/tensor:fp32"
"""One fp32 scale for the tensor: amax / 127, so codes are whole numbers."""


def quantizer(spec: str) -> ActivationQuantizer:
    return ActivationQuantizer(parse_activation(spec))


def state(module: ActivationQuantizer) -> list[float]:
    assert module.amax is not None
    return [round(float(value), 6) for value in module.amax]


def row(*values: float) -> Tensor:
    return torch.tensor([values])


@pytest.mark.parametrize("spec", ["mxfp4", "mxfp8", "nvfp4", "mxfp4_plus", "int4_asym", INT8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dynamic_is_plain_fake_quantization(spec: str, dtype: torch.dtype) -> None:
    values = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    module = quantizer(spec)
    assert module.amax is None and not list(module.state_dict())
    assert same_bits(module(values), fake_quantize(values, spec))
    assert same_bits(module(values[0]), fake_quantize(values[0], spec))  # no memory of the first call


def test_static_keeps_the_largest_input_of_the_observation() -> None:
    module = quantizer(f"{INT8}@static")
    assert math.isnan(state(module)[0])
    with pytest.raises(ModelError, match="no static range yet"):
        module(row(1.0))
    with observe_activations(nn.Sequential(module)):
        for values in (row(1.0, -3.0), row(12.7, 0.0), row(5.0, 1.0)):
            assert same_bits(module(values), values)  # unquantized while observed
    assert state(module) == [12.7]
    # scale 12.7 / 127 = 0.1: codes 10, -127 (clipped), 1 and 0
    assert torch.allclose(module(row(1.04, -99.0, 0.06, 0.04)), row(1.0, -12.7, 0.1, 0.0), rtol=1e-6)
    assert state(module) == [12.7]  # and it does not move any more


def test_observation_ends_on_an_error_and_changes_nothing() -> None:
    module = quantizer(f"{INT8}@static")
    with observe_activations(module):
        module(row(5.0))
    with pytest.raises(KeyError), observe_activations(module):
        module(row(2.0))
        raise KeyError
    assert module.observer is None and state(module) == [5.0]


def test_a_new_observation_takes_the_place_of_the_old_range() -> None:
    module = quantizer(f"{INT8}@static")
    for value in (3.0, 2.0):
        with observe_activations(module):
            module(row(value))
        assert state(module) == [value]
    with observe_activations(module):
        pass  # nothing was seen
    assert state(module) == [2.0]


def test_nan_gives_no_range() -> None:
    model = nn.Sequential(quantizer(f"{INT8}@static"))
    with pytest.raises(NonFiniteError, match="input of 0 holds 1 NaN"), observe_activations(model):
        model(row(1.0, float("nan")))


def test_any_observer_can_find_the_range() -> None:
    def make(name: str, spec: ActivationSpec) -> Observer:
        return make_observer("window(2)", fmt=spec.format, quantize=lambda rows, _: rows, name=name)

    module = quantizer(f"{INT8}@static")
    with observe_activations(module, make) as observers:
        for value in (9.0, 2.0, 3.0):
            module(row(value))
    assert list(observers) == [""] and state(module) == [3.0]


def test_observation_leaves_other_ranges_alone() -> None:
    dynamic, ema = quantizer("mxfp4"), quantizer(f"{INT8}@ema(0.5)")
    with observe_activations(nn.Sequential(dynamic, ema)):
        values = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
        assert same_bits(dynamic(values), fake_quantize(values, "mxfp4"))
        assert not same_bits(ema(values), values)


def test_ema_by_hand() -> None:
    """The first call sets the range; each later one moves it by 1 - decay, before it is used."""
    module = quantizer(f"{INT8}@ema(0.75)")
    module(row(8.0, -1.0))
    assert state(module) == [8.0]
    module(row(0.0, -16.0))
    assert state(module) == [10.0]  # 0.75 * 8 + 0.25 * 16
    answer = module(row(2.0, 0.5))
    assert state(module) == [8.0]  # 0.75 * 10 + 0.25 * 2
    assert torch.allclose(answer, row(round(2 * 127 / 8) * 8 / 127, round(0.5 * 127 / 8) * 8 / 127), rtol=1e-6)


def test_window_by_hand() -> None:
    """The maximum of the last calls, the one at hand included."""
    module = quantizer(f"{INT8}@window(3)")
    expected: list[tuple[float, float]] = [(4.0, 4.0), (9.0, 9.0), (1.0, 9.0), (2.0, 9.0), (3.0, 3.0)]
    for value, largest in expected:
        answer = module(row(value, largest / 127))
        assert torch.allclose(answer[0, 1], torch.tensor(largest / 127), rtol=1e-6)  # exactly one step
    assert state(module) == [1.0, 2.0, 3.0]


def test_ranges_of_nvfp4_are_those_of_the_tensor_scale() -> None:
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    module = quantizer("nvfp4@static")
    with observe_activations(module):
        module(values * 3)
    largest = (values * 3).abs().amax()
    assert state(module) == [round(float(largest), 6)]
    assert same_bits(module(values), fake_quantize(values, "nvfp4", amax=largest))
    assert not same_bits(module(values), fake_quantize(values, "nvfp4"))


@pytest.mark.parametrize("kind", ["static", "ema(0.5)", "window(2)"])
def test_the_state_is_saved_and_loaded(kind: str) -> None:
    one, other = quantizer(f"nvfp4@{kind}"), quantizer(f"nvfp4@{kind}")
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    with observe_activations(one):
        one(values)
    other.load_state_dict(one.state_dict())
    assert one.amax is not None and other.amax is not None and same_bits(one.amax, other.amax)
    assert same_bits(one(values * 2), other(values * 2))


@pytest.mark.parametrize("kind", ["ema(0.5)", "window(2)"])
def test_ranges_move_in_eval_mode_and_without_gradients(kind: str) -> None:
    module = quantizer(f"{INT8}@{kind}").eval()
    with torch.inference_mode():
        module(row(8.0))
    module(row(4.0).requires_grad_())
    assert state(module)[-1] in (6.0, 4.0)
    assert module.amax is not None and not module.amax.requires_grad


@pytest.mark.parametrize("kind", ["dynamic", "static", "ema(0.5)", "window(2)"])
def test_a_gradient_passes_and_the_values_and_ranges_are_the_same(kind: str) -> None:
    one, other = quantizer(f"nvfp4@{kind}"), quantizer(f"nvfp4@{kind}")
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for module in (one, other):
        with observe_activations(module):
            module(values)
    leaf = values.clone().requires_grad_()
    rounded = one(leaf)
    assert same_bits(rounded.detach(), other(values)) and not same_bits(rounded.detach(), values)
    if one.amax is not None and other.amax is not None:
        assert same_bits(one.amax, other.amax)
    (rounded * values).sum().backward()
    assert leaf.grad is not None and same_bits(leaf.grad, values)
    with torch.no_grad():
        assert not one(leaf).requires_grad
    assert not one(values).requires_grad


def test_nan_and_inf_in_the_inputs() -> None:
    """They poison their block, and only finite numbers count for a range."""
    for bad in (float("nan"), float("inf")):
        values = torch.ones(1, 64)
        values[0, 3], values[0, 60] = bad, -3.0
        assert torch.isnan(quantizer("mxfp4")(values)).sum() == 32
        for kind, expected in (("ema(0.5)", [2.0]), ("window(2)", [1.0, 3.0])):
            module = quantizer(f"nvfp4@{kind}")
            module(torch.ones(1, 64))
            answer = module(values)
            assert bool(torch.isnan(answer[0, :16]).all()) and bool(torch.isfinite(answer[0, 16:]).all())
            assert state(module) == expected
            assert bool(torch.isfinite(module(torch.ones(1, 64))).all())


def test_a_layer_quantizes_its_inputs() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    layer: Any = QuantizedLinear.from_tensor(quantize(weight, "mxfp4"), activations=parse_activation("mxfp8"))
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = fake_quantize(values, "mxfp8") @ layer.weight.T
    assert torch.equal(layer(values), expected)
    assert not torch.equal(layer(values), values @ layer.weight.T)


def test_the_module_says_what_it_is() -> None:
    assert "nvfp4@ema(0.9)" in repr(quantizer("nvfp4@ema(0.9)"))
