"""Reading of calibration texts, and every way in which a file can be bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from microscale.calibration.texts import read_texts
from microscale.errors import TextError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_plain_file_is_one_text(tmp_path: Path) -> None:
    assert list(read_texts(write(tmp_path / "a.txt", "One.\n\nTwo ä.\n"))) == ["One.\n\nTwo ä.\n"]
    assert list(read_texts(str(write(tmp_path / "b", b"\xef\xbb\xbfwith a mark")))) == ["with a mark"]


def test_json_lines_are_texts_in_order(tmp_path: Path) -> None:
    lines = [{"text": "one\u2028line"}, {"text": " "}, {"text": "two", "more": 1}]
    path = write(tmp_path / "a.jsonl", "\ufeff" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert list(read_texts(path)) == ["one\u2028line", "two"]
    path = write(tmp_path / "b.ndjson", '{"body": "x"}\r\n{"body": "y"}')
    assert list(read_texts(path, field="body")) == ["x", "y"]


GOOD = '{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt is empty"),
        ("a.txt", " \n\t\n", r"a\.txt is empty"),
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 \(invalid start byte at byte 3\)"),
        ("a.jsonl", "\n\n", r"a\.jsonl is empty"),
        ("a.jsonl", '{"text": ""}', r"a\.jsonl is empty"),
        ("a.jsonl", GOOD + "\n" + '{"text": "b', r"line 3 of .*a\.jsonl is no JSON \(Unterminated string .* column 10"),
        ("a.jsonl", GOOD + "[1]", r"line 2 of .*a\.jsonl must be an object like {'text': …}, got list"),
        ("a.jsonl", GOOD + '{"body": "x", "id": 1}', r"line 2 of .* has no field 'text'; its fields are 'body', 'id'"),
        ("a.jsonl", GOOD + "{}", r"line 2 .* its fields are none"),
        ("a.jsonl", GOOD + '{"text": null}', r"field 'text' of line 2 of .* must hold text, got NoneType"),
        ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}', r"line 2 of .* is not UTF-8"),
        ("a.jsonl", "[" * 100_000, r"line 1 of .*a\.jsonl is"),
    ],
)
def test_bad_files(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(TextError, match=message):
        list(read_texts(path))


@pytest.mark.parametrize("name", ["absent.txt", "absent.jsonl"])
def test_an_absent_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"absent\.\w+ cannot be read: No such file"):
        list(read_texts(tmp_path / name))


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="is a directory; give a text file"):
        list(read_texts(tmp_path))
