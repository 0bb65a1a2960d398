"""Which models a file layout cannot hold, and which layers it has no place for."""

from __future__ import annotations

import pytest

from microscale.errors import LayoutError
from microscale.nn.experts import unstack_experts
from microscale.recipes.obstacles import layers_without_place, layout_obstacle
from microscale.recipes.plan import make_plan
from microscale.recipes.recipe import make_recipe
from tiny_models import tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_layout_of_gpt_oss_is_for_that_family(family: str) -> None:
    model = tiny_model(family)
    unstack_experts(model)
    with pytest.raises(LayoutError, match=f"models of type gpt_oss, and .* is of type '{family}'"):
        make_plan(model, make_recipe(format="mxfp4", layout="gpt-oss"))


def test_experts_alone_have_a_place_there() -> None:
    model = tiny_model("gpt_oss")
    unstack_experts(model)
    experts, rest = "model.layers.0.mlp.experts.3.up_proj", "model.layers.0.self_attn.q_proj"
    assert layers_without_place(model, "gpt-oss", [experts, rest]) == {rest}
    assert layers_without_place(model, "microscale", [experts, rest]) == set()
    plan = make_plan(model, make_recipe(format="mxfp4", layout="gpt-oss"))
    assert plan.layout == "gpt-oss" and len(plan.layers) == 24
    assert all(".experts." in layer.name for layer in plan.layers) and rest in plan.unquantized
    layers = {layer.name: layer for layer in plan.layers}
    assert layout_obstacle(model, "gpt-oss", layers) is None
    del layers[experts]
    assert f"{experts} is to stay in floats" in (layout_obstacle(model, "gpt-oss", layers) or "")


@pytest.mark.parametrize("word", ["quark", "microscale"])
def test_other_layouts_hold_what_they_hold_layer_by_layer(word: str) -> None:
    assert layout_obstacle(tiny_model("mixtral"), word, {}) is None


def test_experts_and_compressed_tensors() -> None:
    model = tiny_model("mixtral")
    assert "stacked experts" in (layout_obstacle(model, "compressed-tensors", {}) or "")
    unstack_experts(model)
    assert "block_sparse_moe" in (layout_obstacle(model, "compressed-tensors", {}) or "")
    other = tiny_model("qwen3_moe")
    unstack_experts(other)
    assert "does not run all experts" in (layout_obstacle(other, "auto", {}) or "")
    assert layout_obstacle(other, "compressed-tensors", {}) is None
