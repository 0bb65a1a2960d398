"""Words are parsed where they enter, once each, however many layers a model has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import microscale
from microscale.algorithms import pipeline
from microscale.formats import registry
from microscale.integrations.loading import load_original


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: Counter[str]) -> None:
    function: Callable[..., Any] = getattr(owner, name)

    def counted(*given: Any) -> Any:
        calls[name] += 1
        return function(*given)

    monkeypatch.setattr(owner, name, counted)


def test_nothing_is_parsed_for_each_layer(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller says two formats and one step; before, 254 formats and 253 chains were parsed for these 63 layers."""
    model = load_original(shared_dir / "models" / "llama-30m")
    calls: Counter[str] = Counter()
    count_calls(monkeypatch, registry, "parse_spec", calls)
    count_calls(monkeypatch, pipeline, "_parse_step", calls)
    microscale.quantize(model, "mxfp4", activations="mxfp8", method="rtn")
    assert calls["parse_spec"] <= 2 and calls["_parse_step"] <= 1
