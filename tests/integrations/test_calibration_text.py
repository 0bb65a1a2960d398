"""Calibration texts by file or dataset name; the datasets library is played by a small stand-in."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from microscale.errors import DependencyError, TextError
from microscale.integrations.calibration_text import read_calibration


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Install a stand-in for datasets and return the list of calls to it."""
    made: list[tuple[Any, ...]] = []

    def rows(name: str) -> Iterator[dict[str, Any]]:
        yield {"text": "one", "page": "eins"}
        yield {"text": " ", "page": "zwei"}
        if name == "broken/off":
            raise ConnectionError("lost")
        yield {"text": "two", "page": 3}

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        made.append((name, config, split, streaming))
        if name == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub")
        return iter([]) if split == "empty" else rows(name)

    module: Any = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return made


def test_a_dataset_is_streamed(calls: list[tuple[Any, ...]]) -> None:
    assert list(read_calibration("Salesforce/wikitext:wikitext-2-raw-v1")) == ["one", "two"]
    assert next(read_calibration("wikitext", field="page", split="test")) == "eins"
    assert calls == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", True),
        ("wikitext", None, "test", True),
    ]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("no/such", {}, r"'no/such' is no file, and no dataset .* \(split 'train'\): Dataset 'no/such' doesn't"),
        ("broken/off", {}, "dataset 'broken/off' broke off: lost"),
        (
            "some/set",
            {"field": "body"},
            "row 1 of dataset 'some/set' has no field 'body'; its fields are 'text', 'page'",
        ),
        ("some/set", {"field": "page"}, "field 'page' of row 3 of dataset 'some/set' must hold text, got int"),
        ("some/set", {"split": "empty"}, "split 'empty' of dataset 'some/set' holds no text"),
    ],
)
def test_bad_datasets(source: str, options: dict[str, str], message: str, calls: list[tuple[Any, ...]]) -> None:
    with pytest.raises(TextError, match=message):
        list(read_calibration(source, **options))
    assert len(calls) == 1


def test_files_never_reach_the_library(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    assert list(read_calibration(tmp_path / "a.jsonl")) == ["x"]
    (tmp_path / "plain").write_text("y")
    assert list(read_calibration(str(tmp_path / "plain"))) == ["y"]
    for absent in ("calibration.txt", "./data", "data/more/a", "a.jsonl", Path("wikitext"), ""):
        with pytest.raises(TextError):
            list(read_calibration(absent))
    assert calls == []


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r"'wikitext' \(no file .*microscale\[datasets\]"):
        list(read_calibration("wikitext"))


@pytest.mark.parametrize("text", ["word " * 1000, "one line\nand another"])
def test_a_text_in_place_of_a_name_is_told_apart(text: str) -> None:
    with pytest.raises(TextError, match=r"looks like a text itself; in Python give texts as a list"):
        list(read_calibration(text))
