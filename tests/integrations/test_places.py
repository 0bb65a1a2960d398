"""Where the tensors of a file go in a model, and what is no loss."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

import microscale
from microscale.integrations.places import leftover_of, places_of
from tiny_models import add_tensors, save_tiny, tiny_model


def test_what_a_model_computes_anew_is_no_loss(tmp_path: Path) -> None:
    source = save_tiny("llama", tmp_path / "source")
    add_tensors(source, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert leftover_of(microscale.quantize(source, "mxfp4")) is None


def test_names_are_found_as_transformers_renames_them() -> None:
    """A mixture's experts stand one by one in files, and stacked in the model."""
    model = tiny_model("mixtral")
    names = {
        "model.layers.0.block_sparse_moe.experts.1.w2.weight": "model.layers.0.mlp.experts.down_proj",
        "model.layers.1.block_sparse_moe.gate.weight": "model.layers.1.mlp.gate.weight",
        "lm_head.weight": "lm_head.weight",
        "model.layers.7.mlp.gate.weight": None,
    }
    assert places_of(names, model, model.state_dict()) == names
