"""Gradients of one layer at a time against those of a whole backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from measured_models import TEXT_WINDOWS, analyze
from microscale.calibration.cache import ActivationStore
from microscale.nn.experts import unstack_experts
from small_models import save_random_model


def test_gradients_are_those_of_autograd(path: Path) -> None:
    model = microscale.load(path, dtype=torch.float32)
    found = {layer.name: layer for layer in analyze(model, ActivationStore(None, "gradients")).layers}
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    name, seen = "model.layers.0.mlp.down_proj", list[torch.Tensor]()

    def watch(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(seen.append)

    handle = model.get_submodule(name).register_forward_hook(watch)
    scores = model(input_ids=TEXT_WINDOWS, use_cache=False).logits[:, :-1]
    torch.nn.functional.cross_entropy(scores.flatten(0, 1), TEXT_WINDOWS[:, 1:].flatten()).backward()
    handle.remove()
    facts = found[name].output_gradients
    assert facts is not None and facts.rows == 120
    assert facts.std == pytest.approx(float(seen[0].double().std(unbiased=False)), rel=1e-3)
    assert facts.maximum == pytest.approx(float(seen[0].max()), rel=1e-3)
    assert found[name].errors["mxfp4"].gradient_qsnr_db is not None
    assert found[name].errors["mxfp8/none"].gradient_qsnr_db is None
    for part in (name, "model.layers.1.self_attn.q_proj", "model.layers.0.input_layernorm", "model.norm", "lm_head"):
        own, wanted = found[part].weight_gradients, model.get_submodule(part).weight.grad.double()
        assert own is not None
        assert own.minimum == pytest.approx(float(wanted.min()), rel=1e-3), part
        assert own.std == pytest.approx(float(wanted.std(unbiased=False)), rel=1e-3), part
    embedding = found["model.embed_tokens"].weight_gradients
    assert embedding is not None
    assert embedding.maximum == pytest.approx(float(model.model.embed_tokens.weight.grad.max()), rel=1e-3)


def test_gradients_of_other_families(tmp_path: Path) -> None:
    for family in ("gpt2", "gemma3_text", "qwen3_moe"):
        model = microscale.load(save_random_model(tmp_path / family, family))
        unstack_experts(model)
        found = analyze(model, ActivationStore(None, "gradients"))
        assert not [layer.name for layer in found.layers if layer.role == "norm" and layer.inputs is None], family
        embedding = next(layer for layer in found.layers if layer.role == "embedding")
        assert embedding.weight_gradients is not None and embedding.weight_gradients.std > 0, family
        sides = {(one.role, one.side) for one in found.recommendations}
        assert ("attention.out", "output gradients") in sides and ("attention.out", "weight gradients") in sides
