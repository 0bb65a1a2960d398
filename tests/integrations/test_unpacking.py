"""Packed modules become float ones that compute the same, and can be quantized anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import microscale
from family_models import family_model, run
from microscale.integrations.unpacking import make_floats
from microscale.nn.packed import PackedModule


@pytest.mark.parametrize("family", ["llama-biases-tied", "gpt2", "gemma3", "mixtral"])
def test_the_model_computes_what_it_did(family: str) -> None:
    model: Any = family_model(family, dtype=torch.float32)
    kinds = {name: type(module) for name, module in model.named_modules()}
    head = "lm_head" if family == "llama-biases-tied" else None
    include = ["embedding", *([head] if head else [])]
    microscale.quantize(model, "mxfp8", method="hadamard", include=include)
    expected = run(model)
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedModule)]
    assert make_floats(model, torch.float32) == len(packed) > 4
    assert not any(isinstance(module, PackedModule) for module in model.modules())
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    for name in packed:
        if name in kinds:
            assert type(model.get_submodule(name)) is kinds[name], name
    if head:
        assert model.lm_head.weight is model.get_input_embeddings().weight
    microscale.quantize(model, "mxfp4")
