"""The torch.library operators: a spec is resolved once in a process, and exported programs run in another one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from microscale.formats import parse_activation, parse_format
from microscale.kernels import quantize, torch_ops
from microscale.nn import QuantizedLinear

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
