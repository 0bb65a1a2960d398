"""Write a recipe as YAML, as :func:`microscale.recipes.recipe.load_recipe` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from microscale.recipes.recipe import Recipe


def recipe_text(recipe: Recipe, comments: Sequence[str] = ()) -> str:
    """Return a recipe as YAML with comment lines on top; what has its default value is left out."""
    fields: dict[str, Any] = recipe.model_dump(mode="json", exclude_defaults=True)
    fields = {"format": recipe.format.word} | {name: value for name, value in fields.items() if name != "format"}
    if "rules" in fields:
        fields["rules"] = [{k: v for k, v in rule.items() if v is not None} for rule in fields["rules"]]
    head = "".join(f"# {line}\n" for comment in comments for line in comment.splitlines())
    return head + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=120)
