"""The operators of torch.library: one node in a graph, the bits of eager code, and results of the right shape.

A spec is resolved once in a process, and exported programs run in another one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from microscale.formats import Draw, parse_activation, parse_format
from microscale.kernels import (
    dequantize,
    fake_quantize,
    linear,
    preferred_layout,
    quantize,
    to_layout,
    torch_ops,
)
from microscale.nn.linear import QuantizedLinear
from microscale.tensor import QuantizedTensor
from vectors.inputs import same_bits

WEIGHT, INPUTS = torch.linspace(-2, 3, 8 * 64).reshape(8, 64), torch.linspace(-1, 1, 3 * 64).reshape(3, 64)
SPEC, ACTIVATIONS = "e2m1/32:ue5m3:amax", "e3m2/32:e8m0:ceil"


def layer() -> QuantizedLinear:
    return QuantizedLinear.from_tensor(quantize(WEIGHT, SPEC), activations=parse_activation(ACTIVATIONS))


def test_a_spec_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []

    def counting(spec: str) -> object:
        parsed.append(spec)
        return parse_format(spec)

    monkeypatch.setattr(torch_ops, "parse_format", counting)
    exported = torch.export.export(layer(), (INPUTS,)).module()
    torch_ops._resolved.cache_clear()
    first: Tensor = exported(INPUTS)
    assert len(parsed) == 2 == len(set(parsed))  # weights and inputs
    assert torch.equal(exported(INPUTS), first) and torch.equal(layer()(INPUTS), first)
    assert len(parsed) == 2


def test_an_exported_program_runs_in_a_new_process(tmp_path: Path) -> None:
    module = layer()
    torch.export.save(torch.export.export(module, (INPUTS,)), tmp_path / "layer.pt2")
    torch.save(INPUTS, tmp_path / "inputs.pt")
    script = f"""
import torch, microscale.kernels
exported = torch.export.load({str(tmp_path / "layer.pt2")!r}).module()
torch.save(exported(torch.load({str(tmp_path / "inputs.pt")!r})), {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    assert torch.equal(torch.load(tmp_path / "out.pt"), module(INPUTS))


class Projection(torch.nn.Module):
    """Fake-quantized inputs times a packed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(1)), "nvfp4")
        for name, part in self.packed.parts.items():
            self.register_buffer(name, part)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        packed = self.packed
        parts = {name: getattr(self, name) for name in packed.parts}
        weight = QuantizedTensor(format=packed.format, shape=packed.shape, dtype=packed.dtype, parts=parts)
        return fake_quantize(inputs, parse_format("mxfp4_plus")) @ dequantize(weight).T


def test_compile_keeps_one_graph_and_the_bits() -> None:
    module, inputs = Projection(), torch.randn(3, 64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs), module(inputs))
    dynamic = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(dynamic(torch.ones(5, 64)), module(torch.ones(5, 64)))


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_bits(strict: bool) -> None:
    module, inputs = Projection(), torch.randn(3, 64)
    exported = torch.export.export(module, (inputs,), strict=strict)
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert "microscale.fake_quantize.default" in names and "microscale.dequantize.default" in names
    assert torch.equal(exported.module()(inputs), module(inputs))


def test_the_operators_pass_the_checks_of_torch() -> None:
    packed = quantize(torch.randn(4, 32), "mxfp8")
    torch.library.opcheck(
        torch.ops.microscale.fake_quantize.default, (torch.randn(2, 32), "mxfp4", None, None, "inputs")
    )
    arguments = (list(packed.parts.values()), list(packed.parts), "mxfp8", [4, 32], torch.bfloat16, "row_major")
    torch.library.opcheck(torch.ops.microscale.dequantize.default, arguments)


def preferred(spec: str, rows: int, cols: int) -> QuantizedTensor:
    """A weight in the layout that the kernels at hand like best."""
    weight = quantize(torch.randn(rows, cols, generator=torch.Generator().manual_seed(2)), spec)
    return to_layout(weight, preferred_layout(weight, torch.float32))


def test_linear_is_compiled_and_exported() -> None:
    weight = preferred("mxfp4_plus", 32, 64)

    class Layer(torch.nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.relu(linear(inputs, weight, activations="mxfp8"))

    layer, inputs = Layer(), torch.randn(3, 64)
    expected = layer(inputs)
    exported = torch.export.export(layer, (inputs,)).module()
    assert torch.equal(exported(inputs), expected)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(inputs), expected)


def test_a_draw_passes_through_the_compiler() -> None:
    values = torch.randn(3, 64)

    def rounded(inputs: Tensor, step: int) -> Tensor:
        return fake_quantize(inputs, "mxfp4:stochastic", draw=Draw(seed=7, step=step, place=5)) * 2

    compiled = torch.compile(rounded, fullgraph=True, backend="aot_eager")
    for step in range(4):
        assert same_bits(compiled(values, step), rounded(values, step))


def test_operators_give_the_bits_of_eager_code() -> None:
    operators = torch.ops.microscale
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    amax = torch.tensor(2.0)
    assert same_bits(
        operators.fake_quantize(values, "nvfp4", amax, None, "x"), fake_quantize(values, "nvfp4", amax=amax)
    )
    drawn = operators.fake_quantize(values, "mxfp4:stochastic", None, [3, 5, 7], "x")
    assert same_bits(drawn, fake_quantize(values, "mxfp4:stochastic", draw=Draw(seed=3, step=5, place=7)))
    assert not same_bits(drawn, fake_quantize(values, "mxfp4:stochastic", draw=Draw(seed=3, step=7, place=5)))
    weight = preferred("mxfp4_plus", 32, 40)
    parts, names = list(weight.parts.values()), list(weight.parts)
    restored = operators.dequantize(parts, names, "mxfp4_plus", [32, 40], torch.float16, weight.layout)
    assert same_bits(restored, dequantize(weight, torch.float16))
    inputs, bias = torch.randn(2, 3, 40), torch.randn(32)
    got = operators.linear(inputs, parts, names, "mxfp4_plus", 32, torch.float32, weight.layout, bias, "mxfp8")
    assert same_bits(got, linear(inputs, weight, bias, activations="mxfp8"))


def test_tracing_knows_shapes_and_dtypes_without_numbers() -> None:
    """A fake result is what the compiler plans memory by: contiguous, whatever the strides of the input."""
    operators = torch.ops.microscale
    weight = quantize(torch.ones(6, 64), "mxfp4")
    with FakeTensorMode() as mode:
        parts = [mode.from_tensor(part) for part in weight.parts.values()]
        turned = torch.empty(64, 5, dtype=torch.bfloat16).T
        rounded = operators.fake_quantize(turned, "mxfp8", None, None, "x")
        restored = operators.dequantize(parts, list(weight.parts), "mxfp4", [6, 64], torch.float16, "row_major")
        product = operators.linear(
            torch.empty(2, 5, 64, dtype=torch.bfloat16), parts, list(weight.parts), "mxfp4", 6, torch.float32,
            "row_major", None, None,
        )  # fmt: skip
    assert (tuple(rounded.shape), rounded.dtype, rounded.is_contiguous()) == ((5, 64), torch.bfloat16, True)
    assert (tuple(restored.shape), restored.dtype) == ((6, 64), torch.float16)
    assert (tuple(product.shape), product.dtype) == ((2, 5, 6), torch.bfloat16)
