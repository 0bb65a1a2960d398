"""`microscale methods`: every step and chain, whole at every width of the terminal."""

from __future__ import annotations

import io
import re
from collections import defaultdict

import pytest
from rich.console import Console

from command_line import fail, succeed
from microscale.algorithms.pipeline import parse_method
from microscale.algorithms.registry import EFFORTS, METHODS, STEPS
from microscale.cli import output


def cells(table: str) -> list[list[str]]:
    """Read tables back: the lines of a cell in one, without the spaces at which lines are broken."""
    rows: list[list[str]] = []
    for line in table.splitlines():
        if not line.startswith("│"):
            continue
        pieces = [piece.strip() for piece in line.strip("│").split("│")]
        if pieces[0]:
            rows.append(pieces)
        else:
            rows[-1] = [before + piece for before, piece in zip(rows[-1], pieces, strict=True)]
    return [[re.sub(r"\s", "", cell) for cell in row] for row in rows]


@pytest.mark.parametrize("width", [200, 80, 60, 58])
def test_nothing_is_lost_in_a_narrow_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(output, "console", Console(file=written, width=width, force_terminal=True, color_system=None))
    monkeypatch.setattr(output.console, "file", written)
    succeed("methods")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", written.getvalue())
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown.replace("0.1 …", "")
    found: dict[str, list[list[str]]] = defaultdict(list)
    for row in cells(shown):
        found["methods" if row[2] in ("yes", "no") else "steps"].append(row)
    chains = {row[0]: row[1] for row in found["methods"]}
    assert {name: chains[name] for name in METHODS} == {name: parse_method(name).text for name in METHODS}
    assert [row[0] for row in found["methods"]][-2 * len(EFFORTS) :] == 2 * list(EFFORTS), "best, and best for others"
    assert [row[0] for row in found["steps"]] == list(STEPS)
    for row, step in zip(found["steps"], STEPS.values(), strict=True):
        assert row[3] == step.source.replace(" ", "")
        assert row[2] == re.sub(r"\s", "", (step.__doc__ or "").strip().split("\n")[0])


def test_a_pipe_gets_every_cell_in_one_line() -> None:
    shown = succeed("methods").stdout
    assert len(cells(shown)) == shown.count("\n│") and parse_method("macroblock").text in shown


def test_one_chain_in_full() -> None:
    chain = "rule+hadamard:size=16+gptq:damp=0.02"
    assert chain in succeed("methods", chain).stdout
    assert succeed("methods", "mr-gptq", "--json").json["methods"] == {"mr-gptq": "rule+hadamard+gptq"}
    assert "unknown method or step 'x'" in fail("methods", "x")
