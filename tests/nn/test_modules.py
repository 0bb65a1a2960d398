"""Packed modules: casts, devices, caches, copies, and the same numbers as the dequantized weight."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from format_specs import SPECS
from microscale.errors import ShapeError
from microscale.formats import parse_activation, parse_format
from microscale.kernels import dequantize, quantize
from microscale.layer_spec import LayerSpec
from microscale.nn import (
    ActivationQuantizer,
    NarrowEmbedding,
    PackedModule,
    QuantizedEmbedding,
    QuantizedLinear,
    cached_weights,
)
from small_models import same_bits, same_tensors

ROWS, COLS = 48, 80


def weight(rows: int = ROWS, cols: int = COLS, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(dtype)


def packed_linear(spec: str, *, bias: bool = True, activations: str | None = None) -> QuantizedLinear:
    return QuantizedLinear.from_tensor(
        quantize(weight(), spec),
        bias=weight(1, ROWS)[0] if bias else None,
        activations=None if activations is None else parse_activation(activations),
    )


def packed_embedding(spec: str) -> QuantizedEmbedding:
    return QuantizedEmbedding.from_tensor(quantize(weight(), spec))


def inputs(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(2, 3, COLS, generator=torch.Generator().manual_seed(1)).to(dtype)


INDICES = torch.tensor([[0, 47, 5], [5, 5, 31]])


@pytest.mark.parametrize("spec", SPECS)
def test_linear_is_that_of_the_dequantized_weight(spec: str) -> None:
    layer = packed_linear(spec)
    restored = dequantize(quantize(weight(), spec))
    assert same_bits(layer.weight, restored)
    assert layer.bias is not None
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        exact = dequantize(quantize(weight(), spec), dtype)
        expected = functional.linear(inputs(dtype), exact, layer.bias.to(dtype))
        assert same_bits(layer(inputs(dtype)), expected)
    without = packed_linear(spec, bias=False)
    assert without.bias is None
    assert same_bits(without(inputs()), functional.linear(inputs(), restored))


@pytest.mark.parametrize("spec", SPECS)
def test_looking_up_rows_is_that_of_the_dequantized_table(spec: str) -> None:
    table = packed_embedding(spec)
    restored = dequantize(quantize(weight(), spec))
    for indices in (INDICES, INDICES[0], INDICES[0, 0], torch.empty(0, dtype=torch.int64), INDICES.to(torch.int32)):
        expected = functional.embedding(indices, restored)
        assert same_bits(table(indices), expected)
        with cached_weights(table):
            assert same_bits(table(indices), expected)
    assert table(INDICES).shape == (2, 3, COLS)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("activations", [None, "mxfp8"])
def test_a_cached_weight_changes_no_bit(spec: str, activations: str | None) -> None:
    layer = packed_linear(spec, activations=activations)
    for dtype in (torch.bfloat16, torch.float32):
        expected = layer(inputs(dtype))
        with cached_weights(layer):
            assert layer.float_weight(dtype) is not None
            assert same_bits(layer(inputs(dtype)), expected)
            assert same_bits(layer(inputs(dtype)), expected)
        assert layer.float_weight(dtype) is None


def test_the_cache_is_dropped_on_errors_and_casts() -> None:
    model = nn.Sequential(packed_linear("mxfp4"), nn.Identity())
    with pytest.raises(KeyError), cached_weights(model):
        raise KeyError
    layer: Any = model[0]
    assert layer.float_weight(torch.bfloat16) is None
    with cached_weights(model):
        model.to(torch.float32)
        assert layer.float_weight(torch.float32) is None
        assert model(inputs(torch.float32)).dtype == torch.float32


CASTS: dict[str, Any] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "float": lambda module: module.float(),
    "double": lambda module: module.double(),
    "to(float16)": lambda module: module.to(torch.float16),
    "to(tensor)": lambda module: module.to(torch.ones(1, dtype=torch.float16)),
    "there and back": lambda module: module.half().float().bfloat16(),
    "type": lambda module: module.type(torch.float16),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_never_touches_packed_parts(spec: str, cast: str) -> None:
    for module in (packed_linear(spec, activations="nvfp4@static"), packed_embedding(spec)):
        before = {name: buffer.clone() for name, buffer in module.named_buffers()}
        holder = nn.Sequential(module, nn.Linear(2, 2))
        CASTS[cast](holder)
        assert same_tensors(before, dict(module.named_buffers())) == []
        assert same_bits(module.weight, dequantize(quantize(weight(), spec)))


def test_a_cast_moves_bias_and_output_dtype() -> None:
    layer, table = packed_linear("mxfp4"), packed_embedding("mxfp4")
    assert table(INDICES).dtype == torch.bfloat16
    nn.Sequential(layer, table).to(torch.float32)
    assert layer.bias is not None and layer.bias.dtype == torch.float32
    assert table(INDICES).dtype == torch.float32
    assert same_bits(table(INDICES).to(torch.bfloat16), packed_embedding("mxfp4")(INDICES))


@pytest.mark.parametrize("state", ["static", "ema", "window"])
def test_a_cast_never_touches_an_activation_range(state: str) -> None:
    """It is float32, and may be larger than float16 can say."""
    quantizer = ActivationQuantizer(parse_activation(f"nvfp4@{state}"))
    assert quantizer.amax is not None
    quantizer.amax.fill_(123456.789)
    nn.Sequential(quantizer).half().bfloat16()
    assert quantizer.amax.dtype == torch.float32
    assert bool((quantizer.amax == torch.tensor(123456.789)).all())


@pytest.mark.parametrize("spec", SPECS)
def test_modules_without_content(spec: str) -> None:
    """On the meta device: shapes and dtypes are known, nothing is allocated; content comes by the state dict."""
    fmt = parse_format(spec)
    full: list[PackedModule] = [packed_linear(spec, activations="nvfp4@static"), packed_embedding(spec)]
    layer = LayerSpec(
        name="layer",
        format=fmt,
        shape=(ROWS, COLS),
        dtype=torch.bfloat16,
        activations=parse_activation("nvfp4@static"),
        has_bias=True,
    )
    table = LayerSpec(name="table", format=fmt, shape=(ROWS, COLS), dtype=torch.bfloat16, kind="embedding")
    empty: list[PackedModule] = [QuantizedLinear(layer, device="meta"), QuantizedEmbedding(table, device="meta")]
    assert [one.layer_spec(name) for one, name in zip(empty, ("layer", "table"), strict=True)] == [layer, table]
    for one, other in zip(full, empty, strict=True):
        state = other.state_dict()
        assert {name: (part.shape, part.dtype) for name, part in state.items()} == {
            name: (part.shape, part.dtype) for name, part in one.state_dict().items()
        }
        assert all(part.is_meta for part in state.values())
        assert other.tensor.device.type == "meta"
        other.to_empty(device="cpu")
        other.load_state_dict(one.state_dict())
        assert same_bits(other.weight, one.weight)
    linear_pair: Any = (full[0], empty[0])
    for layer in linear_pair:
        layer.activations.amax.fill_(3.0)
    assert same_bits(linear_pair[0](inputs()), linear_pair[1](inputs()))


@pytest.mark.parametrize("spec", SPECS)
def test_copies(spec: str) -> None:
    for module in (packed_linear(spec, activations="nvfp4@window(2)"), packed_embedding(spec)):
        twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        twins.append(torch.load(buffer, weights_only=False))
        argument = inputs() if isinstance(module, QuantizedLinear) else INDICES
        expected = copy.deepcopy(module)(argument)
        for twin in twins:
            assert twin.format == module.format and twin.method == module.method
            assert same_tensors(dict(module.named_buffers()), dict(twin.named_buffers())) == []
            assert not {part.data_ptr() for part in twin.buffers()} & {part.data_ptr() for part in module.buffers()}
            assert same_bits(twin(argument), expected)


def test_the_module_shares_memory_with_its_tensor_and_says_what_it_is() -> None:
    layer = packed_linear("mxfp4_plus", activations="mxfp8")
    assert layer.tensor.parts["codes"].data_ptr() == layer.weight_codes.data_ptr()  # type: ignore[union-attr]
    assert set(layer.state_dict()) == {"weight_codes", "weight_scale", "weight_index", "bias"}
    text = repr(layer)
    assert "48x80" in text and "mxfp4_plus" in text and "mxfp8_e4m3" in text
    assert (layer.in_features, layer.out_features, layer.method, layer.kind) == (COLS, ROWS, "rtn", "linear")
    table = packed_embedding("mxfp4")
    assert (table.num_embeddings, table.embedding_dim, table.kind) == (ROWS, COLS, "embedding")


def test_gradients_pass_through_to_the_inputs() -> None:
    layer = packed_linear("mxfp4")
    argument = inputs(torch.float32).requires_grad_()
    layer(argument).sum().backward()
    assert argument.grad is not None
    expected = dequantize(quantize(weight(), "mxfp4"), torch.float32).sum(0)
    assert torch.allclose(argument.grad, expected.expand_as(argument.grad), rtol=1e-5, atol=1e-5)


def test_wrong_inputs() -> None:
    with pytest.raises(ShapeError, match=r"\[2, 3, 79\]"):
        packed_linear("mxfp4")(inputs()[..., :79])
    for spec in ("mxfp4", "adaptive_2_4"):
        with pytest.raises(IndexError):
            packed_embedding(spec)(torch.tensor([ROWS]))


def test_a_shared_weight_is_replaced_in_a_state_dict_of_another_format() -> None:
    with pytest.raises(RuntimeError, match="weight_index"):
        packed_linear("mxfp4").load_state_dict(packed_linear("mxfp4_plus").state_dict())


def test_a_narrow_table_is_the_table_cast_as_a_whole() -> None:
    table = NarrowEmbedding(ROWS, COLS, dtype=torch.bfloat16, output_dtype=torch.float32)
    table.weight = weight()
    for indices in (INDICES, INDICES[0, 0], torch.empty(0, dtype=torch.int64)):
        assert same_bits(table(indices), functional.embedding(indices, weight().to(torch.float32)))
    for cast in (torch.float16, torch.float32, torch.bfloat16):
        table.to(cast)
        assert table.weight.dtype == torch.bfloat16, "the table stays as it is stored"
        assert same_bits(table(INDICES), functional.embedding(INDICES, weight()).to(cast))
    assert list(table.state_dict()) == ["weight"] and not list(table.parameters())
    assert "bfloat16" in repr(table)
