"""Which layers a budget is spread over: roles, choices by hand, fused layers."""

from __future__ import annotations

from typing import Any

import pytest

from measured_models import FORMATS
from microscale.errors import AllocationError
from microscale.planning.allocated_layers import Grouping, allocated_layers, parse_fixed
from microscale.planning.candidates import parse_candidates


@pytest.mark.parametrize("text", ["mlp.down", "=mxfp8", "norm=mxfp8", "kv_cache=mxfp4/mxfp8", "mlp.down=mxfp5"])
def test_bad_choices_by_hand(text: str) -> None:
    with pytest.raises(AllocationError):
        parse_fixed(text)


def test_a_role_that_the_model_lacks(model: Any) -> None:
    with pytest.raises(AllocationError, match=r"roles of this model: attention\.out, attention\.qkv, embedding"):
        allocated_layers(model, FORMATS, fixed=[parse_fixed("moe.gate=mxfp8")])
    with pytest.raises(AllocationError, match="leave layers alone"):
        allocated_layers(model, parse_candidates("none"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mlp.down", "--fix 'mlp.down' must read ROLE=FORMAT or GLOB=FORMAT, e.g. mlp.down=mxfp8"),
        ("=mxfp8", "--fix '=mxfp8' must read ROLE=FORMAT"),
        ("mlp.down=", "--fix 'mlp.down=' must read ROLE=FORMAT"),
        ("norm=mxfp8", "--fix norm=mxfp8: norms are not stored in a block format by a recipe; only norm=none"),
        ("kv_cache=mxfp4/mxfp8", "the KV cache has one format and no method, e.g. kv_cache=mxfp8"),
        ("kv_cache=mxfp4@rtn", "the KV cache has one format and no method"),
    ],
)
def test_what_bad_choices_are_told(text: str, words: str) -> None:
    with pytest.raises(AllocationError) as caught:
        parse_fixed(text)
    assert words in str(caught.value)


def test_choices_by_hand() -> None:
    pattern, candidate = parse_fixed("*.down_proj=mxfp8/none@gptq:damp=0.1")
    assert (pattern, candidate.text) == ("*.down_proj", "mxfp8/none@gptq:damp=0.1")
    assert parse_fixed("norm=none")[1].is_kept and parse_fixed("kv_cache=mxfp8")[1].text == "mxfp8"


def test_layers_roles_and_candidates(model: Any) -> None:
    """The last choice by hand wins; norms and the cache are no layers; what is fixed becomes part of the plan."""
    fixed = [parse_fixed(text) for text in ("mlp.down=mxfp8", "*.1.mlp.down_proj=none", "lm_head=mxfp4", "norm=none")]
    layers, every = allocated_layers(model, FORMATS, fixed=fixed, exclude=["*.0.mlp.gate_proj"])
    assert [candidate.text for candidate in every] == ["mxfp4", "nvfp4", "mxfp6_e2m3", "mxfp8", "none"]
    found = {layer.name.removeprefix("model.layers."): layer for layer in layers}
    assert "0.mlp.gate_proj" not in found and len(found) == 2 * 7 - 1 + 1
    assert found["0.mlp.down_proj"].candidates == (3,) and found["1.mlp.down_proj"].candidates == (4,)
    assert found["lm_head"].candidates == (0,) and found["0.mlp.up_proj"].candidates == (0, 1, 2)
    down = found["0.mlp.down_proj"]
    assert (down.role, down.kind, down.shape, down.num_weights) == ("mlp.down", "linear", (64, 96), 6144)
    assert down.fused == (down.name,)


def test_fused_layers_read_the_same_input(model: Any) -> None:
    layers, _ = allocated_layers(model, FORMATS, grouping=Grouping.FUSED)
    fused = {layer.name: layer.fused for layer in layers}
    stem = "model.layers.1"
    together = tuple(f"{stem}.self_attn.{letter}_proj" for letter in "qkv")
    assert all(fused[name] == together for name in together)
    assert fused[f"{stem}.mlp.up_proj"] == (f"{stem}.mlp.gate_proj", f"{stem}.mlp.up_proj")
    assert fused[f"{stem}.mlp.down_proj"] == (f"{stem}.mlp.down_proj",)
