"""Files of tasks: where they are looked for, compression, archives, and everything that can be wrong with them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zipfile
from pathlib import Path

import pytest

from microscale.errors import TaskError
from microscale.evaluation import task_files
from microscale.evaluation.task_files import (
    TextFile,
    archive_names,
    csv_rows,
    find_file,
    json_lines,
    json_list,
    read_file,
    read_member,
)

TEXT = "first\nsecond é\n"


@pytest.mark.parametrize("place", ["", "tasks", "texts", "../texts"])
def test_where_a_file_is_looked_for(place: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / "texts").mkdir(exist_ok=True)
    (folder / place / "a.txt").write_text(TEXT, "utf-8")
    assert read_file(find_file(folder, "t", ("absent.txt", "a.txt"))).text == TEXT


def compressed(path: Path, kind: str) -> Path:
    content = TEXT.encode()
    target = path / f"a.txt{kind}"
    if kind == ".zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("inside/a.txt", content * 50)
    else:
        pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[kind]
        target.write_bytes(pack(content * 50))
    return target


@pytest.mark.parametrize("kind", ["", ".gz", ".bz2", ".xz", ".zip"])
def test_compression(kind: str, tmp_path: Path) -> None:
    path = compressed(tmp_path, kind)
    assert find_file(tmp_path, "t", ("a.txt",)) == path
    assert read_file(path).text == TEXT * 50


@pytest.mark.parametrize("kind", [".gz", ".bz2", ".xz", ".zip"])
@pytest.mark.parametrize("damage", ["truncated", "other", "flipped"])
def test_damaged_compression(kind: str, damage: str, tmp_path: Path) -> None:
    path = compressed(tmp_path, kind)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "other":
        content = bytearray(b"this is no archive at all")
    else:
        middle = len(content) // 2 if kind != ".zip" else 45
        content[middle] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(TaskError, match="cannot be read"):
        read_file(path)


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_files, "MAX_BYTES", 100)
    for kind in ("", ".gz", ".zip"):
        with pytest.raises(TaskError, match="more than 100 bytes"):
            read_file(compressed(tmp_path, kind))


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b" \n", "is empty"), (b"ab\xff\xfe", "not UTF-8")])
def test_no_text(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(TaskError, match=words):
        read_file(path)
    with pytest.raises(TaskError, match="cannot be read"):
        read_file(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task piqa.*expected piqa/valid.jsonl or b"):
        find_file(tmp_path, "piqa", ("piqa/valid.jsonl", "b"))
    with pytest.raises(TaskError, match="is not a folder"):
        find_file(tmp_path / "absent", "piqa", ("a",))


def test_archives_and_folders_alike(tmp_path: Path) -> None:
    archive_path, folder = tmp_path / "a.zip", tmp_path / "a"
    with zipfile.ZipFile(archive_path, "w") as archive:
        for name in ("data/x.jsonl", "data/.hidden.jsonl", "__MACOSX/._x.jsonl", "data/x.txt"):
            archive.writestr(name, name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    for path in (archive_path, folder):
        assert archive_names(path, ".jsonl") == ["data/x.jsonl"]
        assert read_member(path, "data/x.jsonl").text == "data/x.jsonl"
        with pytest.raises(TaskError):
            read_member(path, "data/absent.jsonl")
    with pytest.raises(TaskError, match="must hold one file, got 2"):
        read_file(archive_path)


def test_json_lines_and_lists() -> None:
    found = json_lines(TextFile(where="f", text='{"a": 1}\n\n{"a": "\u2028"}\n'))
    assert found == [("f, line 1", {"a": 1}), ("f, line 3", {"a": "\u2028"})]
    assert json_list(TextFile(where="f", text='[{"a": 1}]')) == [("f, item 1", {"a": 1})]


@pytest.mark.parametrize("line", ['{"a": 1', "[1]", "3", "nul", "[" * 100_000])
def test_broken_json(line: str) -> None:
    with pytest.raises(TaskError, match="f, line 2"):
        json_lines(TextFile(where="f", text='{"a": 1}\n' + line))
    with pytest.raises(TaskError, match="f"):
        json_list(TextFile(where="f", text=line))


def test_csv() -> None:
    rows = csv_rows(TextFile(where="f", text='a,"b, ""c""\nd"\n\ne,f\n'))
    assert [cells for _, cells in rows] == [["a", 'b, "c"\nd'], ["e", "f"]]
    with pytest.raises(TaskError, match="not CSV"):
        csv_rows(TextFile(where="f", text='a,"b"c\n'))
    with pytest.raises(TaskError, match="not CSV"):
        csv_rows(TextFile(where="f", text='a,"never closed\n'))
