"""Rules whose fields are words, as a file has them."""

from __future__ import annotations

from microscale.recipes.recipe import RecipeRule


def make_rule(**words: str | None) -> RecipeRule:
    """Read a rule; pydantic makes records of its words."""
    return RecipeRule.model_validate(words)
