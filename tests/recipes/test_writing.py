"""A recipe as YAML comes back as the same recipe, without what nobody said."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from microscale.recipes.recipe import Recipe, load_recipe, make_recipe, parse_rule
from microscale.recipes.writing import recipe_text

RECIPES = [
    make_recipe(format="mxfp4"),
    make_recipe(format="e2m1/32:e8m0:ceil", activations="nvfp4@static", method="awq+gptq", nan="poison"),
    make_recipe(
        format="none",
        rules=(parse_rule("*.down_proj=mxfp8/mxfp8"), parse_rule("lm_head=none")),
        include=("lm_head",),
        exclude=("attention.qkv", "*.0.*"),
        attention="mxfp8",
        kv_cache="mxfp4",
    ),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_what_is_written_is_read_back(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_text(recipe, ["found on text", "two\nlines"]))
    assert load_recipe(path) == recipe


def test_the_text_by_hand() -> None:
    recipe = make_recipe(format="e2m1/32:e8m0", method="gptq", rules=(parse_rule("*.down_proj=mxfp8"),))
    assert recipe_text(recipe, ["first", "second\nthird"]) == (
        "# first\n# second\n# third\n"
        "format: e2m1/32:e8m0\n"
        "method: gptq\n"
        "rules:\n- match: '*.down_proj'\n  weights: mxfp8\n"
    )


def test_a_recipe_of_defaults_is_its_format() -> None:
    assert yaml.safe_load(recipe_text(make_recipe(format="nvfp4"))) == {"format": "nvfp4"}
