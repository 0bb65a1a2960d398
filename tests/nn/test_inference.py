"""Laying a model's weights out anew: same numbers, same files, one layer at a time, and the way back."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn

import microscale
from bounds import exact_linear, linear_bound
from microscale.errors import LayoutError
from microscale.kernels import dispatch, preferred_layout, quantize
from microscale.kernels.backend import Backend, Operation, Request
from microscale.kernels.reference import BACKEND as REFERENCE
from microscale.nn.embedding import QuantizedEmbedding
from microscale.nn.inference import cached_weights, prepare_for_inference, row_major_weights
from microscale.nn.linear import QuantizedLinear
from microscale.nn.packed import PackedModule
from packed_modules import lay_out
from small_models import logits, read_tensors, same_bits, same_tensors, save_random_model


@pytest.fixture(autouse=True)
def only_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout changes no number: seen on the reference path, which sums in one order whatever the layout."""
    monkeypatch.setattr(dispatch, "BACKENDS", [REFERENCE])


def numbers(rows: int = 40, cols: int = 96) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(3))


def packed_linear(spec: str = "mxfp4_plusplus") -> QuantizedLinear:
    return QuantizedLinear.from_tensor(quantize(numbers(), spec), bias=numbers(1, 40)[0])


def small_stack() -> nn.Sequential:
    return nn.Sequential(
        QuantizedEmbedding.from_tensor(quantize(numbers(), "mxfp8")),
        QuantizedLinear.from_tensor(quantize(numbers(96, 96), "mxfp8_plus")),
        nn.Linear(96, 96),
        QuantizedLinear.from_tensor(quantize(numbers(96, 96), "e4m3/16x16:fp32")),
        QuantizedLinear.from_tensor(quantize(numbers(96, 96), "nvfp4_plus")),
    )


def layouts(model: nn.Module) -> list[str]:
    return [module.layout for module in model.modules() if isinstance(module, PackedModule)]


def cpu_backend(why_not: str | None = None) -> Backend:
    """A backend that reads rows16 only."""

    def refuse(request: Request) -> str | None:
        return why_not if request.layout == "rows16" else "reads rows16"

    return Backend(
        name="fast",
        title="a fast one",
        rank=1,
        implementations={Operation.LINEAR: REFERENCE.implementations[Operation.LINEAR]},
        why_not=refuse,
        wanted_layout=lambda fmt, shape, dtype, device: "rows16",
    )


@pytest.mark.parametrize("spec", ["mxfp4", "mxfp8_plus", "mxfp4_plusplus", "int4_asym", "nvfp4_plus", "mxfp4_sparse"])
def test_a_module_in_another_layout_is_the_same_layer(spec: str) -> None:
    layer, before = packed_linear(spec), packed_linear(spec)
    layer.set_layout("rows16")
    assert layer.layout == layer.tensor.layout == "rows16"
    assert same_bits(layer.weight, before.weight)
    inputs, weight, bias = numbers(2), before.weight, before.bias
    assert bias is not None
    bound = linear_bound(inputs, weight, layer.format, bias)
    for each in (layer, before):
        assert bool(((each(inputs) - exact_linear(inputs, weight, bias)).abs() <= bound).all())
    held = {name.removeprefix("weight_") for name, _ in layer.named_buffers() if name.startswith("weight_")}
    assert held == set(layer.tensor.parts), "the old parts are gone"
    assert same_tensors(dict(layer.state_dict()), dict(before.state_dict())) == []
    layer.set_layout("row_major")
    assert same_tensors(dict(layer.state_dict()), dict(before.state_dict())) == []
    assert list(layer.state_dict()) == list(before.state_dict())


@pytest.mark.parametrize("spec", ["mxfp4", "mxfp8_plus", "mxfp4_plusplus", "int4_asym", "nvfp4_plus", "mxfp4_sparse"])
def test_the_backends_at_hand_stay_within_rounding(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sums of the same products in float32 differ by at most 2 k eps times the sum of their magnitudes."""
    layer = packed_linear(spec)
    expected, size = layer(numbers(5)), numbers(5).abs() @ layer.weight.abs().T + numbers(1, 40).abs()
    monkeypatch.undo()
    prepare_for_inference(layer)
    bound = 2 * (96 + 2) * torch.finfo(torch.float32).eps * size
    assert bool(((layer(numbers(5)) - expected).abs() <= bound).all())


def test_a_refused_format_leaves_the_module_as_it_was() -> None:
    layer = packed_linear("e4m3/16x16:fp32")
    with pytest.raises(LayoutError, match="last axis"):
        layer.set_layout("rows16")
    with pytest.raises(LayoutError, match="swizzled"):
        layer.set_layout("swizzled")
    assert layer.layout == "row_major" and same_bits(layer.weight, packed_linear("e4m3/16x16:fp32").weight)


def test_casts_leave_it_and_other_devices_undo_it() -> None:
    layer = packed_linear("int4_asym")
    layer.set_layout("rows16")
    parts = dict(layer.tensor.parts)
    for cast in (torch.float32, torch.float16, torch.bfloat16):
        layer.to(cast)
        assert layer.layout == "rows16" and same_tensors(parts, dict(layer.tensor.parts)) == []
    assert layer.to("cpu").layout == "rows16"
    moved = layer.to("meta")
    assert moved.layout == "row_major" and set(moved.tensor.parts) == set(packed_linear("int4_asym").tensor.parts)


def test_copies_and_pickles_keep_the_layout() -> None:
    layer = packed_linear()
    layer.set_layout("rows16")
    twin = copy.deepcopy(layer)
    assert twin.layout == "rows16" and same_bits(twin.weight, layer.weight)
    twin.set_layout("row_major")
    assert layer.layout == "rows16", "the copy stands alone"
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.layout == "rows16" and same_bits(loaded(numbers(2)), layer(numbers(2)))


def test_a_state_dict_can_be_loaded_into_any_layout() -> None:
    source = QuantizedLinear.from_tensor(quantize(numbers().flip(0), "mxfp4_plusplus"), bias=numbers(1, 40)[0])
    layer = packed_linear()
    layer.set_layout("rows16")
    before = layer.weight
    layer.load_state_dict(source.state_dict())
    assert layer.layout == "rows16"
    assert same_bits(layer.weight, source.weight) and not same_bits(layer.weight, before)


def test_the_tensor_record_follows_its_buffers() -> None:
    layer = packed_linear("mxfp4")
    record = layer.tensor
    assert layer.tensor is record
    layer._buffers["weight_scale"] = record.parts["scale"] + 1
    assert layer.tensor is not record and same_bits(layer.tensor.parts["scale"], record.parts["scale"] + 1)


def test_linear_layers_change_their_layout_and_back() -> None:
    model = small_stack()
    expected = model(torch.tensor([[3, 1]]))
    assert lay_out(model, "rows16") == ["1", "4"]
    assert layouts(model) == ["row_major", "rows16", "row_major", "rows16"]
    assert lay_out(model, "rows16") == []
    close = 2.0**-16 * expected.abs().amax()  # four layers of float32 sums in another order
    assert bool(((model(torch.tensor([[3, 1]])) - expected).abs() <= close).all())
    with row_major_weights(model):
        assert layouts(model) == ["row_major"] * 4
    assert layouts(model) == ["row_major", "rows16", "row_major", "rows16"]
    assert lay_out(model, "row_major") == ["1", "4"]
    with pytest.raises(LayoutError):
        packed_linear().set_layout("swizzled")


def test_row_major_weights_come_back_after_an_error() -> None:
    model = small_stack()
    lay_out(model, "rows16")
    with pytest.raises(RuntimeError, match="stop"), row_major_weights(model):
        raise RuntimeError("stop")
    assert layouts(model) == ["row_major", "rows16", "row_major", "rows16"]


def test_inference_takes_the_layout_of_a_backend_that_is_willing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_stack()
    assert prepare_for_inference(model) == [] and set(layouts(model)) == {"row_major"}
    monkeypatch.setattr(dispatch, "BACKENDS", [cpu_backend("not today"), REFERENCE])
    assert prepare_for_inference(model) == []
    monkeypatch.setattr(dispatch, "BACKENDS", [cpu_backend(), REFERENCE])
    assert preferred_layout(quantize(numbers(), "mxfp4"), torch.float32) == "rows16"
    assert preferred_layout(quantize(numbers(), "e4m3/16x16:fp32"), torch.float32) == "row_major"
    assert prepare_for_inference(model) == ["1", "4"]
    with cached_weights(model):
        cached = [
            module.float_weight(torch.float32) is not None
            for module in model.modules()
            if isinstance(module, PackedModule)
        ]
    assert cached == [True, False, True, False], "a weight with a kernel is not kept as floats"
    monkeypatch.setattr(dispatch, "BACKENDS", [REFERENCE])
    assert prepare_for_inference(model) == ["1", "4"], "and back, where the backend is gone"


@pytest.mark.parametrize("layout", ["microscale", "compressed-tensors"])
def test_saving_writes_row_major(tmp_path: Path, layout: str) -> None:
    source = save_random_model(tmp_path / "source")
    model = microscale.quantize(source, "mxfp4")
    microscale.save(model, tmp_path / "before", layout=layout)
    expected = logits(model)
    assert len(lay_out(model, "rows16")) == 14
    assert same_bits(logits(model), expected)
    microscale.save(model, tmp_path / "after", layout=layout)
    assert set(layouts(model)) == {"rows16"}, "and the model is as before"
    assert same_tensors(read_tensors(tmp_path / "before"), read_tensors(tmp_path / "after")) == []
    model.save_pretrained(tmp_path / "direct")
    assert same_bits(logits(microscale.load(tmp_path / "direct")), expected)
    loaded = microscale.load(tmp_path / "after")
    assert set(layouts(loaded)) == {"row_major"}
    lay_out(loaded, "rows16")
    assert same_bits(logits(loaded), expected)


def test_a_prepared_model_follows_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", [cpu_backend(), REFERENCE])
    layer, before = packed_linear(), packed_linear()
    assert layer.prepare(torch.float32) and not layer.prepare(torch.float32)
    size = layer.num_bytes
    assert size == before.num_bytes, "what a file holds, whatever the layout pads"
    layer.half()
    assert layer.layout == "rows16"
    lay_out(layer, "row_major")
    assert layer.half().layout == "row_major", "what was laid out by hand stays"


@pytest.mark.parametrize("layout", ["microscale", "compressed-tensors"])
def test_what_is_quantized_or_loaded_is_laid_out_and_saves_the_same_bytes(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_random_model(tmp_path / "source")
    microscale.save(microscale.quantize(source, "mxfp4"), tmp_path / "plain", layout=layout)
    monkeypatch.undo()
    model = microscale.quantize(source, "mxfp4")
    loaded = microscale.load(tmp_path / "plain")
    expected = preferred_layout(quantize(numbers(), "mxfp4"), torch.float32)
    for name, each in (("quantized", model), ("loaded", loaded)):
        assert set(layouts(each)) == {expected}
        microscale.save(each, tmp_path / name, layout=layout)
        assert same_tensors(read_tensors(tmp_path / "plain"), read_tensors(tmp_path / name)) == []
        assert set(layouts(each)) == {expected}
        assert set(layouts(each.to("meta"))) == {"row_major"}
