"""The records of the analysis page: massive values in words, each once, and no more than a page can show."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from measured_models import analyze
from microscale.jobs.analyze_page import MAX_MASSIVE, analysis_page, massive_values
from microscale.planning.layer_facts import Side


def massive(value: float, row: int, channel: int, window: int | None = None, windows: int = 1) -> Any:
    return SimpleNamespace(value=value, row=row, channel=channel, window=window, windows=windows)


def layer(name: str, **facts: Any) -> Any:
    sides = {Side[key.upper()]: value for key, value in facts.items()}
    return SimpleNamespace(name=name, tensors=lambda: sides)


def facts(*values: Any, std: float = 2.0) -> Any:
    return SimpleNamespace(massive=values, std=std)


def found(*layers: Any) -> Any:
    return SimpleNamespace(layers=layers)


def test_activations_come_first_and_a_channel_has_one_line() -> None:
    shared = facts(massive(-50.0, 3, 7, window=1, windows=4), massive(9.0, 0, 1, window=0, windows=2))
    again = facts(massive(70.0, 5, 7, window=2, windows=3), massive(60.0, 6, 7, window=2, windows=1), std=1.0)
    layers = found(
        layer("one", weights=facts(massive(8.0, 5, 6), std=0.0), inputs=shared),
        layer("two", inputs=shared),
        layer("three", inputs=again),
    )
    shown = massive_values(layers, 16, lambda window, row: f"<{window}.{row}>")
    assert [(one.title, one.words) for one in shown] == [
        (
            "channel 7 of inputs",
            "70 (70 standard deviations) in three at token 5 ('<2.5>'), in 3 of 16 windows; also in 1 other tensor",
        ),
        ("channel 1 of inputs", "9 (4 standard deviations) in one at token 0 ('<0.0>'), in 2 of 16 windows"),
        ("channel 6 of weights", "8 (0 standard deviations) in one, row 5"),
    ], "one input of two layers counts once; the last is a tensor without spread"


@pytest.mark.parametrize("more", [0, 1, 5])
def test_a_page_shows_so_many(more: int) -> None:
    layers = found(*(layer("one", weights=facts(massive(1.0, 0, place))) for place in range(MAX_MASSIVE + more)))
    shown = massive_values(layers, 1, lambda window, row: "")
    assert len(shown) == MAX_MASSIVE + bool(more)
    if more:
        assert shown[-1].title == "others" and shown[-1].words.startswith(f"{more} more channel{'s' * (more > 1)};")


def test_a_page_names_every_tensor_of_a_model() -> None:
    pytest.importorskip("jinja2")
    from tiny_models import tiny_model

    analysis = analyze(tiny_model("llama", vocab_size=300))
    page = analysis_page("the title", analysis, {"model": "tiny"}, [], [])
    assert "the title" in page and all(one.name in page for one in analysis.layers)
