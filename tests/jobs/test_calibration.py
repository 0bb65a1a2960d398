"""What may be calibrated on, in every form that a user has, and what is refused with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from family_models import family_model
from microscale.errors import CalibrationError, ModelError, ShapeError, TextError
from microscale.jobs.calibration import (
    check_tokenizer,
    checked_source,
    measure_ranges,
    parse_feed,
    range_notes,
    read_windows,
)
from microscale.jobs.shared_options import CalibrationOptions
from microscale.nn.experts import ExpertTokens
from microscale.recipes.apply import quantize_model
from microscale.recipes.calibration import Calibration, Feed
from microscale.recipes.ranges import RangeReport
from microscale.recipes.recipe import make_recipe
from small_models import byte_tokenizer
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", vocab_size=300)


def options(source: Any, **others: Any) -> CalibrationOptions:
    return CalibrationOptions(source=source, **others)


def test_sources_in_all_forms() -> None:
    ids = np.arange(6, dtype=np.uint16).reshape(2, 3)
    found = checked_source(ids)
    assert isinstance(found, Tensor) and found.dtype == torch.int64 and found.tolist() == ids.tolist()
    for source in (None, "text.txt", Path("text.txt"), torch.ones(1, 2)):
        assert checked_source(source) is source
    assert checked_source(("one", "two")) == ["one", "two"]


@pytest.mark.parametrize(("source", "got"), [(3, "int 3"), ([], "list"), (["a", 2], "list of str, int"), ({}, "dict")])
def test_other_sources_are_refused(source: object, got: str) -> None:
    with pytest.raises(CalibrationError, match=rf"integer tensor or array; got {got}"):
        checked_source(source)
    with pytest.raises(CalibrationError, match="got ndarray"):
        checked_source(np.ones(3))


def test_words_of_a_feed() -> None:
    assert [parse_feed(feed.value) for feed in Feed] == list(Feed)
    with pytest.raises(CalibrationError, match="unknown feed 'both'; possible: "):
        parse_feed("both")


def test_text_needs_a_tokenizer() -> None:
    check_tokenizer(byte_tokenizer())
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        check_tokenizer(None)


def test_token_ids_are_taken_as_they_are(model: Any) -> None:
    ids = torch.arange(20, dtype=torch.int32).reshape(2, 10)
    found = read_windows(options(ids, seed=5), None, model, feed="quantized")
    assert torch.equal(found.windows, ids.to(torch.int64)) and found.seed == 5 and found.feed is Feed("quantized")


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.arange(10), "float|int64 \\[samples, tokens\\], got torch.int64 \\[10\\]"),
        (torch.zeros(2, 0, dtype=torch.int64), "got torch.int64"),
        (torch.full((1, 4), 300), "ids from 300 to 300 of 300"),
        (torch.full((1, 4), -1), "ids from -1 to -1 of 300"),
    ],
)
def test_token_ids_that_the_model_does_not_have(ids: Tensor, said: str, model: Any) -> None:
    with pytest.raises(TextError, match=said):
        read_windows(options(ids), None, model)


def test_windows_are_cut_from_all_texts(model: Any) -> None:
    """Texts follow each other with the end-of-text token between them; a window begins with BOS where there is one."""
    tokenizer = byte_tokenizer()
    found = read_windows(options(["abcd" * 40, "wxyz" * 40], samples=4, window=16), tokenizer, model)
    assert found.windows.shape == (4, 16)
    again = read_windows(options(["abcd" * 40, "wxyz" * 40], samples=4, window=16), tokenizer, model)
    assert torch.equal(found.windows, again.windows), "the same seed draws the same windows"
    with pytest.raises(ShapeError, match="longer than the 256 positions"):
        read_windows(options("x", window=300), tokenizer, model)
    with pytest.raises(CalibrationError, match="nothing to read"):
        read_windows(options(None), tokenizer, model)


def test_layers_without_a_range_or_with_one_of_few_tokens_are_named() -> None:
    assert range_notes(RangeReport(ranges={"layers.1": 1.0}, unseen=())) == []
    few, unseen = range_notes(
        RangeReport(ranges={}, unseen=("layers.1", "layers.2"), few={"layers.3": 9, "layers.4": 2})
    )
    assert unseen.startswith("no calibration token reached 2 layers") and "layers.1;" in unseen
    assert "2 layers rest on fewer than 16 tokens, e.g. layers.4 (2)" in few


def test_static_ranges_of_experts_that_no_token_reaches() -> None:
    """Where all tokens go through all experts, every layer gets a range."""
    windows = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1))
    for tokens, unseen in ((ExpertTokens.ROUTED, 12), (ExpertTokens.ALL, 0)):
        model: Any = family_model("mixtral", dtype=torch.float32)
        for layer in model.model.layers:
            layer.mlp.gate.weight.data.zero_()
        quantize_model(model, make_recipe(format="nvfp4", activations="nvfp4@static"))
        calibration = Calibration(windows=windows, experts=tokens)
        assert len(measure_ranges(model, calibration, "minmax").unseen) == unseen
