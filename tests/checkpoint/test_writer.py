"""The atomic writer: a directory appears whole or not at all, whatever goes wrong and wherever."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from microscale.checkpoint.writer import check_target, write_directory, write_json, write_text_file
from microscale.errors import CheckpointWriteError


def fill(directory: Path) -> None:
    """Write a directory that looks like a model."""
    write_json(directory / "config.json", {"name": "new"})
    (directory / "deep").mkdir()
    (directory / "deep" / "data.bin").write_bytes(b"new" * 100)


def old_model(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"name": "old"}')
    (path / "only_old.bin").write_bytes(b"old")
    return path


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


OLD = {"config.json": b'{"name": "old"}', "only_old.bin": b"old"}


def test_a_new_directory_with_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "model"
    assert write_directory(target, fill) == target
    assert json.loads((target / "config.json").read_text()) == {"name": "new"}
    assert content(target)["deep/data.bin"] == b"new" * 100
    assert [entry.name for entry in target.parent.iterdir()] == ["model"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_directory(tmp_path / "model", fill)
    assert set(content(tmp_path / "model")) == {"config.json", "deep/data.bin"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_nothing_is_at_the_target_before_all_is_written(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def look(directory: Path) -> None:
        assert directory.parent == tmp_path and directory != target
        assert not target.exists()
        fill(directory)

    write_directory(target, look)
    assert target.exists()


FAILURES: list[type[BaseException]] = [OSError, KeyboardInterrupt, RuntimeError, MemoryError, SystemExit]


@pytest.mark.parametrize("failure", FAILURES)
def test_an_interruption_leaves_nothing(failure: type[BaseException], tmp_path: Path) -> None:
    def break_off(directory: Path) -> None:
        fill(directory)
        raise failure("in the middle")

    expected = CheckpointWriteError if failure is OSError else failure
    with pytest.raises(expected, match="in the middle"):
        write_directory(tmp_path / "model", break_off)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", FAILURES)
def test_an_interruption_while_overwriting_leaves_the_old_one_whole(
    failure: type[BaseException], tmp_path: Path
) -> None:
    target = old_model(tmp_path / "model")

    def break_off(directory: Path) -> None:
        fill(directory)
        raise failure("in the middle")

    with pytest.raises((CheckpointWriteError, failure), match="in the middle"):
        write_directory(target, break_off, overwrite=True)
    assert content(target) == OLD
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_overwriting_replaces_all(tmp_path: Path) -> None:
    target = old_model(tmp_path / "model")
    write_directory(target, fill, overwrite=True)
    assert set(content(target)) == {"config.json", "deep/data.bin"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@contextmanager
def failing_renames(monkeypatch: pytest.MonkeyPatch, which: Callable[[int], bool]) -> Generator[None]:
    """Let some of the calls of Path.rename (counted from 1) fail as a file system does."""
    original, calls = Path.rename, [0]

    def rename(self: Path, target: Path) -> Path:
        calls[0] += 1
        if which(calls[0]):
            raise OSError(30, "Read-only file system")
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        yield
    assert calls[0]


@pytest.mark.parametrize("call", [1, 2])
def test_a_rename_that_fails_while_overwriting_leaves_the_old_one_whole(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = old_model(tmp_path / "model")
    with (
        failing_renames(monkeypatch, lambda number: number == call),
        pytest.raises(CheckpointWriteError, match="Read-"),
    ):
        write_directory(target, fill, overwrite=True)
    assert content(target) == OLD
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_the_old_one_is_never_deleted_before_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename after the first fails, the one that would put the old directory back included."""
    target = old_model(tmp_path / "model")
    with failing_renames(monkeypatch, lambda number: number > 1), pytest.raises(CheckpointWriteError) as caught:
        write_directory(target, fill, overwrite=True)
    (kept,) = [path for path in tmp_path.rglob("only_old.bin")]
    assert content(kept.parent) == OLD
    assert str(kept.parent) in str(caught.value)  # and the user is told where it is


def test_a_rename_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with failing_renames(monkeypatch, lambda number: True), pytest.raises(CheckpointWriteError, match="Read-only"):
        write_directory(tmp_path / "model", fill)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    def never(directory: Path) -> None:
        raise AssertionError(directory)

    target = old_model(tmp_path / "model")
    for call in (lambda: check_target(target), lambda: write_directory(target, never)):
        with pytest.raises(CheckpointWriteError, match="exists already; choose another place, or say --overwrite"):
            call()
    assert content(target) == OLD


def test_overwriting_refuses_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(CheckpointWriteError, match="holds no model"):
        write_directory(tmp_path / "photos", fill, overwrite=True)
    assert content(tmp_path / "photos") == {"cat.png": b"cat"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointWriteError, match="not a directory"):
        write_directory(tmp_path / "file", fill, overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("below", ["file/model", "file/deep/model"])
def test_a_target_below_a_file(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointWriteError, match="cannot write to"):
        write_directory(tmp_path / below, fill)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_place_where_nobody_can_write() -> None:
    place = Path("/proc/microscale-test/model")
    if not place.parents[1].is_dir():
        pytest.skip("needs Linux's /proc, where not even root makes a directory")
    with pytest.raises(CheckpointWriteError, match="cannot write to /proc/microscale-test"):
        write_directory(place, fill)


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(CheckpointWriteError):
        write_directory(tmp_path / ("long" * 100), fill)
    assert list(tmp_path.iterdir()) == []


def test_the_directory_of_the_process_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = old_model(tmp_path / "model")
    monkeypatch.chdir(target)
    with pytest.raises(CheckpointWriteError):
        write_directory(".", fill, overwrite=True)
    assert content(target) == OLD
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_an_error_of_safetensors_is_ours(tmp_path: Path) -> None:
    def wrong(directory: Path) -> None:
        save_file({"a": torch.ones(2)}, directory / "absent" / "model.safetensors")

    with pytest.raises(CheckpointWriteError, match="nothing was left there"):
        write_directory(tmp_path / "model", wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_text_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "page.html"
    write_text_file(file, "ä" * 10)
    write_text_file(file, "second")
    assert file.read_text("utf-8") == "second"
    assert [entry.name for entry in file.parent.iterdir()] == ["page.html"]


def test_a_text_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    for target in (tmp_path / "taken", Path("/proc/microscale-test/page.html")):
        with pytest.raises(CheckpointWriteError):
            write_text_file(target, "text")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_a_text_that_cannot_be_encoded_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text_file(tmp_path / "page.html", "\ud800")
    assert (tmp_path / "page.html").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def test_json_is_readable_by_people(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"name": "Größe", "list": [1]})
    assert (tmp_path / "config.json").read_text("utf-8") == '{\n  "name": "Größe",\n  "list": [\n    1\n  ]\n}\n'
