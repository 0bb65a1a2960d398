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


def test_activations_come_first_and_an_input_of_several_layers_once() -> None:
    shared = facts(massive(-50.0, 3, 7, window=1, windows=4), massive(9.0, 0, 1, window=0, windows=2))
    layers = found(layer("one", weights=facts(massive(8.0, 5, 6), std=0.0), inputs=shared), layer("two", inputs=shared))
    shown = massive_values(layers, 16, lambda window, row: f"<{window}.{row}>")
    assert [one.title for one in shown] == ["inputs of one", "weights of one"]
    assert shown[0].words == (
        "-50 at token 3 ('<1.3>'), channel 7, in 4 of 16 windows; 9 at token 0 ('<0.0>'), channel 1, in 2 of 16 windows"
        " (largest: 25 standard deviations)"
    )
    assert shown[1].words == "8 at row 5, channel 6 (largest: 0 standard deviations)", "a tensor without spread"


@pytest.mark.parametrize("more", [0, 1, 5])
def test_a_page_shows_so_many(more: int) -> None:
    layers = found(*(layer(str(place), weights=facts(massive(1.0, 0, 0))) for place in range(MAX_MASSIVE + more)))
    shown = massive_values(layers, 1, lambda window, row: "")
    assert len(shown) == MAX_MASSIVE + bool(more)
    if more:
        assert shown[-1].title == "others" and shown[-1].words.startswith(f"{more} more tensor{'s' * (more > 1)};")


def test_a_page_names_every_tensor_of_a_model() -> None:
    pytest.importorskip("jinja2")
    from tiny_models import tiny_model

    analysis = analyze(tiny_model("llama", vocab_size=300))
    page = analysis_page("the title", analysis, {"model": "tiny"}, [], [])
    assert "the title" in page and all(one.name in page for one in analysis.layers)
