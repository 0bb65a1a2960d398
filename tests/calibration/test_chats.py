"""Chats in records: both forms, parts, and what is refused with its place."""

from __future__ import annotations

from typing import Any

import pytest

from microscale.calibration.chats import chat_in
from microscale.errors import TextError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_both_forms_are_one_chat() -> None:
    found = chat_in({"messages": MESSAGES, "id": 3}, "line 1")
    assert found is not None and found.texts() == MESSAGES
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}]
    assert chat_in({"conversations": turns}, "line 1") == found
    assert chat_in(MESSAGES, "a list") == found
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert chat_in([MESSAGES[0], {"role": "user", "content": parts}], "a list") == found
    assert chat_in({"text": "no chat"}, "line 1") is None and chat_in("text", "line 1") is None


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": []}, "field 'messages' of line 7 holds no messages"),
        ({"messages": ["Hi"]}, "message 1 of field 'messages' of line 7 must be an object"),
        ({"messages": [*MESSAGES, {"role": "user"}]}, "message 3 of"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "message 1 of field 'conversations'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "a part that is no text"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_place(record: dict[str, Any], said: str) -> None:
    with pytest.raises(TextError, match=said):
        chat_in(record, "line 7")
