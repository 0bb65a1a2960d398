"""Chats through the template that lies beside a tokenizer: as text to calibrate on, and as a prompt to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import chat_template_utils

from microscale.errors import TextError

_JINJA: Any = getattr(chat_template_utils, "jinja2", None)
TEMPLATE_ERRORS: tuple[type[BaseException], ...] = (
    *(() if _JINJA is None else (_JINJA.exceptions.TemplateError,)),
    *(ImportError, ValueError, TypeError, KeyError),
)
"""What a template raises that does not take a chat, or transformers where it cannot run templates."""


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer knows how chats are written for its model."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot write chats.

    Raises:
        TextError: it has no template.
    """
    if not has_template(tokenizer):
        raise TextError(
            "the tokenizer has no chat template, so it cannot write chats: put chat_template.jinja beside it, or give"
            " plain text"
        )


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Return a whole chat as the text that the model was trained on, special tokens written out.

    Raises:
        TextError: no template, or one that refuses these messages.
    """
    return _rendered(tokenizer, messages, add_generation_prompt=False)


def chat_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the tokens of a chat up to where the answer begins.

    Raises:
        TextError: no template, or one that refuses these messages.
    """
    text = _rendered(tokenizer, messages, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: bool) -> str:
    check_template(tokenizer)
    try:
        return str(tokenizer.apply_chat_template([dict(one) for one in messages], tokenize=False, **options))
    except TEMPLATE_ERRORS as error:
        roles = ", ".join(str(one.get("role")) for one in messages)
        raise TextError(f"the chat template refuses messages of {roles}: {error}") from error
