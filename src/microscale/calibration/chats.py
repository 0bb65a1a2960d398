"""Chats as calibration text: messages with roles, which the tokenizer's template makes a text of.

Two forms are known: ``messages`` with ``role`` and ``content`` (a text, or a list of parts that are texts), and
``conversations`` with ``from`` and ``value``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

from microscale.errors import TextError

ROLES: Mapping[str, str] = MappingProxyType(
    {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool"}
)
"""What the speakers of ``conversations`` are called in ``messages``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Messages as a chat template takes them: {"role": …, "content": …}."""

    messages: tuple[Mapping[str, str], ...]

    def texts(self) -> list[dict[str, str]]:
        """Return the messages in a list of their own."""
        return [dict(message) for message in self.messages]


def chat_in(record: object, where: str) -> Chat | None:
    """Return the chat that a record holds, or that it is (a list of messages); None where there is none.

    Raises:
        TextError: messages that cannot be read; ``where`` says which record.
    """
    if isinstance(record, list):
        return _chat(cast("list[object]", record), "role", "content", where)
    if not isinstance(record, dict):
        return None
    fields = cast("dict[str, Any]", record)
    for field, speaker, words in (("messages", "role", "content"), ("conversations", "from", "value")):
        if isinstance(fields.get(field), list):
            return _chat(fields[field], speaker, words, f"field {field!r} of {where}")
    return None


def _chat(messages: list[object], speaker: str, words: str, where: str) -> Chat:
    if not messages:
        raise TextError(f"{where} holds no messages")
    found = [_message(one, speaker, words, f"message {i} of {where}") for i, one in enumerate(messages, start=1)]
    return Chat(messages=tuple(found))


def _message(message: object, speaker: str, words: str, where: str) -> Mapping[str, str]:
    fields = cast("dict[str, Any]", message) if isinstance(message, dict) else {}
    role, content = fields.get(speaker), fields.get(words)
    if isinstance(role, str) and speaker == "from":
        role = ROLES.get(role)
    if isinstance(content, list):
        content = _joined(cast("list[object]", content), where)
    if not isinstance(role, str) or not isinstance(content, str):
        form = f"{{{speaker!r}: 'user', {words!r}: '…'}}"
        raise TextError(f"{where} must be an object like {form}, got {str(message)[:80]}")
    return {"role": role, "content": content}


def _joined(parts: list[object], where: str) -> str:
    texts: list[str] = []
    for part in parts:
        fields = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
        text = fields.get("text")
        if fields.get("type", "text") != "text" or not isinstance(text, str):
            raise TextError(f"{where} holds a part that is no text ({str(part)[:60]}); calibrate on texts alone")
        texts.append(text)
    return "".join(texts)
