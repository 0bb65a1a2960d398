"""What a job knows of the model it was given, loaded or not: its label and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from microscale.errors import OptionError
from microscale.integrations.loading import load_tokenizer


def label_of(model: Any) -> str:
    """Return where a model lies, or where a loaded one came from."""
    return str(model if isinstance(model, str | Path) else getattr(model, "name_or_path", type(model).__name__))


def tokenizer_of(model: Any, tokenizer: Any) -> Any:
    """Return the tokenizer that was given, or the one beside a model.

    Raises:
        OptionError: a loaded model without one.
    """
    if tokenizer is not None:
        return tokenizer
    if not isinstance(model, str | Path):
        raise OptionError("a loaded model needs tokenizer=…, such as microscale.load_tokenizer(PATH)")
    return load_tokenizer(model)
