"""Tables with the goal beside each figure, and the JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from benchmarks.cpu.machine import machine_facts
from rich.console import Console
from rich.table import Table

CONSOLE = Console(width=200, highlight=False)
RESULTS = Path(__file__).resolve().parent / "results"


class Verdict(Enum):
    """Whether a figure reaches its goal."""

    MET = "met"
    MISSED = "missed"
    NOISY = "too noisy to say"
    NO_GOAL = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of a table: what was measured, the figure, the goal it is held against (a lower bound)."""

    case: str
    unit: str
    median: float
    q1: float | None = None
    q3: float | None = None
    compared_to: str = ""
    ratio: float | None = None
    goal: float | None = None
    goal_is_at_most: bool = False
    is_noisy: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Compare ratio and goal."""
        if self.goal is None or self.ratio is None:
            return Verdict.NO_GOAL
        if self.is_noisy:
            return Verdict.NOISY
        is_met = self.ratio <= self.goal if self.goal_is_at_most else self.ratio >= self.goal
        return Verdict.MET if is_met else Verdict.MISSED


def show(title: str, figures: Sequence[Figure]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for name in ("case", "median", "quartiles", "unit", "ratio", "of", "goal", "verdict"):
        table.add_column(name, justify="right" if name in ("median", "ratio", "goal") else "left", no_wrap=True)
    colours = {Verdict.MET: "green", Verdict.MISSED: "red", Verdict.NOISY: "yellow", Verdict.NO_GOAL: ""}
    for figure in figures:
        quartiles = "" if figure.q1 is None or figure.q3 is None else f"{_number(figure.q1)} – {_number(figure.q3)}"
        sign = "≤" if figure.goal_is_at_most else "≥"
        verdict = figure.verdict
        table.add_row(
            figure.case,
            _number(figure.median),
            quartiles,
            figure.unit,
            "" if figure.ratio is None else f"{figure.ratio:.2f}",
            figure.compared_to,
            "" if figure.goal is None else f"{sign} {figure.goal:.2f}",
            f"[{colours[verdict]}]{verdict.value}" if verdict.value else "",
        )
    CONSOLE.print(table)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def write(name: str, figures: Sequence[Figure], facts: dict[str, Any]) -> Path:
    """Write ``results/<name>.json``: machine, what was measured how, and every figure."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    rows = [{**asdict(figure), "verdict": figure.verdict.value} for figure in figures]
    path.write_text(json.dumps({"machine": machine_facts(), **facts, "figures": rows}, indent=1) + "\n")
    return path
