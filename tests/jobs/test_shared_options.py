"""Options that jobs share: under their words in the records that hold them."""

from __future__ import annotations

import pytest

from microscale.jobs.evaluate_options import EvaluateOptions
from microscale.jobs.option import Options, given_words, options_of, record_from
from microscale.jobs.quantize_options import RecipeOptions
from microscale.jobs.shared_options import AttentionOptions


@pytest.mark.parametrize("record", [RecipeOptions, EvaluateOptions])
def test_both_sides_of_attention_are_options_of_recipes_and_scores(record: type[Options]) -> None:
    assert {"attention", "kv_cache"} < {one.word for one in options_of(record)}


def test_a_side_that_is_not_given_says_nothing() -> None:
    found = record_from(EvaluateOptions, {"model": "m", "kv_cache": "mxfp8"}).rounding
    assert found.words == (None, "mxfp8") and given_words(found) == {"kv_cache": "mxfp8"}
    assert AttentionOptions().words == (None, None)
