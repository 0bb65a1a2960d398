"""Packed modules: casts, devices, caches and copies leave the packed weight as it is."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from format_specs import SPECS
from microscale.errors import LayoutError
from microscale.formats import parse_activation, parse_format
from microscale.kernels import dequantize, quantize, to_layout
from microscale.layer_spec import LayerSpec
from microscale.nn.activation import ActivationQuantizer
from microscale.nn.embedding import QuantizedEmbedding
from microscale.nn.inference import cached_weights
from microscale.nn.linear import QuantizedLinear
from microscale.nn.packed import PackedModule
from packed_modules import COLS, INDICES, ROWS, inputs, packed_embedding, packed_linear, weight
from small_models import same_bits, same_tensors


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


def test_a_shared_weight_is_replaced_in_a_state_dict_of_another_format() -> None:
    with pytest.raises(RuntimeError, match="weight_index"):
        packed_linear("mxfp4").load_state_dict(packed_linear("mxfp4_plus").state_dict())


@pytest.mark.parametrize(("spec", "num_bytes"), [("mxfp4", 48 * (48 + 3)), ("nvfp4", 48 * (40 + 5) + 4)])
def test_bytes_are_those_of_a_file_in_any_layout(spec: str, num_bytes: int) -> None:
    """MXFP4: 80 columns padded to 96 codes of half a byte and 3 scales; NVFP4: 80 codes, 5 scales, one float32."""
    layer = packed_linear(spec)
    assert layer.num_bytes == num_bytes == sum(part.nbytes for part in layer.tensor.parts.values())
    layer.set_layout("rows16")
    assert layer.num_bytes == num_bytes


def test_another_layout_is_not_seen_in_a_state_dict() -> None:
    layer = packed_linear("mxfp4_plus")
    before = {name: part.clone() for name, part in layer.state_dict().items()}
    layer.set_layout("rows16")
    assert layer.layout == "rows16" and same_tensors(before, layer.state_dict()) == []
    other = packed_linear("mxfp4_plus")
    other.set_tensor(to_layout(quantize(weight() * 2, "mxfp4_plus"), "rows16"))
    other.load_state_dict(before)
    assert other.layout == "rows16" and same_bits(other.weight, layer.weight)


def test_a_layout_without_a_place_leaves_the_module_as_it_was() -> None:
    layer = packed_linear("e4m3/16x16:fp32")
    before = dict(layer.tensor.parts)
    with pytest.raises(LayoutError, match="cannot be laid out as rows16"):
        layer.set_layout("rows16")
    assert layer.layout == "row_major" and all(layer.tensor.parts[name] is part for name, part in before.items())
