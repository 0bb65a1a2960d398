"""Rules whose fields are words, as a file has them."""

from __future__ import annotations

from microscale.recipes.recipe import Rule


def make_rule(**words: str | None) -> Rule:
    """Read a rule; pydantic makes records of its words."""
    return Rule.model_validate(words)
