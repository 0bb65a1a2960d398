"""Who listens to a job on the command line: notes on standard error, at once and as they are."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from microscale.cli import output, reporter
from microscale.cli.reporter import ConsoleReporter


def test_notes_and_stages_go_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = io.StringIO()
    terminal = Console(file=written, width=100, force_terminal=True, color_system=None)
    for module in (output, reporter):
        monkeypatch.setattr(module, "error_console", terminal)
    ConsoleReporter().note("a [long] note of " + "many words " * 12)
    assert written.getvalue() == "a [long] note of " + "many words " * 11 + "many words \n"
    with ConsoleReporter().stage("measuring") as progress:
        progress(2, 5, "layers.1")
    assert "measuring" in written.getvalue() and "2/5" in written.getvalue()
    assert capsys.readouterr().out == ""
