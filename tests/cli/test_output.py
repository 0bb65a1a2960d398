"""Tables, JSON, bars and errors as a user sees them."""

from __future__ import annotations

import io
import json
import signal
from typing import Any

import pytest
import typer
from rich.console import Console

from microscale.cli import output
from microscale.cli.output import (
    Column,
    broken,
    command,
    print_json,
    print_table,
    print_wrapped_table,
    progress_bar,
    shared_widths,
    tell_missing_kernels,
)
from microscale.errors import OptionError, RecipeError
from microscale.kernels import dispatch


def console(monkeypatch: pytest.MonkeyPatch, name: str, *, width: int = 80, is_terminal: bool = False) -> io.StringIO:
    """Put a console that writes to memory in the place of one of ours."""
    written = io.StringIO()
    plain = Console(file=written, width=width, force_terminal=is_terminal, color_system=None, highlight=False)
    monkeypatch.setattr(output, name, plain)
    return written


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def test_json_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), float("inf"), -float("inf"), 1.5], 3: (None, "ü")})
    assert json.loads(capsys.readouterr().out, parse_constant=refuse) == {
        "a": [None, None, None, 1.5],
        "3": [None, "ü"],
    }


def test_tables_drop_columns_instead_of_breaking_cells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = [Column(title="name"), Column(title="first", drop=2), Column(title="second", drop=1)]
    rows = [["x" * 20, "a" * 20, "b" * 20]]
    monkeypatch.setattr(output.console, "width", 55)
    print_table("t", columns, rows)
    assert "a" * 20 in capsys.readouterr().out  # no terminal: everything
    monkeypatch.setattr(type(output.console), "is_terminal", property(lambda self: True))
    print_table("t", columns, rows)
    text = capsys.readouterr().out
    assert "x" * 20 in text and "b" * 20 in text and "a" * 20 not in text
    assert "also shows: first" in text


@pytest.mark.parametrize("width", range(1, 30))
def test_broken_text_is_whole(width: int) -> None:
    text = "rule:weights=prescale(0.75),activations=prescale(0.75)+rtn and some words, too  long"
    lines = broken(text, width).split("\n")
    assert max(map(len, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert broken("short", width if width > 4 else 5) == "short"


def test_room_is_shared() -> None:
    assert shared_widths([5, 30, 40], 100) == [5, 30, 40]
    assert shared_widths([5, 30, 40], 45) == [5, 20, 20]
    assert shared_widths([5, 12, 40], 45) == [5, 12, 28]


def test_a_table_of_a_pipe_breaks_no_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    written = console(monkeypatch, "console", width=10)
    print_table("title", [Column(title="name"), Column(title="n", is_number=True)], [["x" * 30, "7"], ["[b]", "12"]])
    lines = written.getvalue().splitlines()
    assert lines[0].strip() == "title" and any(f"│ {'x' * 30} │  7 │" in line for line in lines)
    assert any("│ [b]" in line and "│ 12 │" in line for line in lines), "markup in a cell is text"


def test_long_cells_are_broken_in_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ["one two three four five six", "x"]
    narrow = console(monkeypatch, "console", width=30, is_terminal=True)
    print_wrapped_table(["words", "y"], [row])
    assert (
        "one two three four five six" not in narrow.getvalue() and max(map(len, narrow.getvalue().splitlines())) <= 30
    )
    pipe = console(monkeypatch, "console", width=20)
    print_wrapped_table(["words", "y"], [row])
    assert "one two three four five six" in pipe.getvalue()


def failing(error: BaseException, **options: Any) -> tuple[int, None]:
    @command
    def study(*, as_json: bool = False, offload: str | None = None) -> None:
        raise error

    study.__wrapped__.__name__ = options.pop("name", "quantize")  # type: ignore[attr-defined]
    with pytest.raises(typer.Exit) as caught:
        study(**options)
    return caught.value.exit_code, None


def test_our_errors_are_a_line_and_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written = console(monkeypatch, "error_console")
    assert failing(RecipeError("no [such] format"))[0] == 1
    assert written.getvalue() == "error: no [such] format\n" and capsys.readouterr().out == ""
    assert failing(RecipeError("no"), as_json=True)[0] == 1
    assert json.loads(capsys.readouterr().out) == {"error": {"class": "RecipeError", "message": "no"}}


def test_options_that_do_not_go_together_are_a_usage_error() -> None:
    @command
    def run() -> None:
        raise OptionError("--a needs --b")

    with pytest.raises(typer.BadParameter, match="--a needs --b"):
        run()


def test_other_errors_are_not_hidden() -> None:
    @command
    def run() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("quantize", {}, output.STARTS_ANEW),
        ("quantize", {"offload": "dir"}, output.GOES_ON),
        ("study", {}, output.GOES_ON),
    ],
)
def test_an_interrupt_says_whether_the_job_goes_on(
    name: str, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = console(monkeypatch, "error_console", width=200)
    assert failing(KeyboardInterrupt(), name=name, **options)[0] == 128 + signal.SIGINT
    assert written.getvalue().strip() == words


def test_a_bar_is_drawn_in_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal in (True, False):
        written = console(monkeypatch, "error_console", width=120, is_terminal=is_terminal)
        with progress_bar("quantizing") as advance:
            advance(3, 14, "layer three")
        assert ("3/14" in written.getvalue() and "layer three" in written.getvalue()) == is_terminal
        assert is_terminal or written.getvalue() == ""


def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microscale.cli.progress.SECONDS_BETWEEN", 0.0)
    written = console(monkeypatch, "error_console", width=20, is_terminal=False)
    with progress_bar("quantizing") as advance:
        advance(3, 14, "model.layers.3 [of many]")
    assert written.getvalue() == "quantizing 3/14, 0 s: model.layers.3 [of many]\n"


def test_advice_of_backends_is_told_in_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    backends = [dataclasses.replace(dispatch.BACKENDS[-1], advice=lambda: "install [g++]"), dispatch.BACKENDS[-1]]
    monkeypatch.setattr("microscale.kernels.BACKENDS", backends)
    written = console(monkeypatch, "error_console", width=20)
    tell_missing_kernels()
    assert written.getvalue() == "note: install [g++]\n"
