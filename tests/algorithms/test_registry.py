"""The tables of steps and chains: what the words stand for, and what ``best`` becomes by effort and format."""

from __future__ import annotations

import dataclasses

import pytest

from microscale.algorithms.balance import Balance
from microscale.algorithms.gptq import Gptq
from microscale.algorithms.pipeline import parse_method
from microscale.algorithms.refine import Refine
from microscale.algorithms.registry import EFFORTS, FINE_EFFORTS, METHODS, PLAIN, STEPS, is_method
from microscale.algorithms.rtn import Rtn
from microscale.algorithms.scale_rule import ScaleRuleStep
from microscale.formats import parse_format


@pytest.mark.parametrize("name", STEPS)
def test_a_word_is_that_of_its_step(name: str) -> None:
    step = STEPS[name]()
    assert step.name == step.text == name, "a bare word has the defaults"
    assert step.source and parse_method(name).of_kind(STEPS[name]) == (step,)
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(step))


def test_plain_is_rounding_to_nearest() -> None:
    assert Rtn() == PLAIN


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rtn", ["rtn"]),
        ("awq", ["awq", "rtn:weighted=true"]),
        ("mr-gptq", ["rule", "hadamard", "gptq"]),
        ("lowrank", ["rtn", "lowrank"]),
        ("spinquant", ["spinquant", "hadamard:size=128,roles=down", "gptq"]),
        ("qad", ["rule", "distill", "rtn"]),
        ("adaptive-2-4", ["micromix:wider=(int4/32:fp16:asym,mxfp8)", "rtn"]),
    ],
)
def test_named_chains(name: str, words: list[str]) -> None:
    assert [step.text for step in parse_method(name).steps] == words


def test_prescaling_divides_both_sides_by_three_quarters() -> None:
    (rule,) = parse_method("prescale").of_kind(ScaleRuleStep)
    assert (rule.weights, rule.activations) == ("prescale(0.75)", "prescale(0.75)")


@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp4_plus", "nvfp4"])
def test_every_effort_goes_on_from_the_one_below(fmt: str) -> None:
    fast, good, most = (
        parse_method("best", effort=one, fmt=parse_format(fmt)).steps for one in ("fast", "good", "max")
    )
    assert good[: len(fast)] == fast and most[: len(good)] == good
    assert any(isinstance(step, Balance) for step in fast) and any(isinstance(step, Gptq) for step in fast)
    assert [type(step) for step in most[len(fast) :]] == [Refine, Refine]
    assert set(EFFORTS) == set(FINE_EFFORTS) == {"fast", "good", "max"}


def test_best_does_not_rotate_blocks_with_fine_scales() -> None:
    coarse, fine = (parse_method("best", fmt=parse_format(name)).text for name in ("mxfp4", "nvfp4"))
    assert "hadamard" in coarse and coarse == parse_method("best").text
    assert fine == parse_method("balance:size=1+gptq").text


@pytest.mark.parametrize(
    ("word", "known"),
    [
        ("best", True),
        ("gptq", True),
        ("mr-gptq", True),
        ("auto", False),
        ("", False),
        ("GPTQ", False),
        ("gptq+rtn", False),
    ],
)
def test_words_that_a_chain_may_begin_with(word: str, known: bool) -> None:
    assert is_method(word) is known


def test_the_tables_are_read_only() -> None:
    for table in (STEPS, METHODS, EFFORTS, FINE_EFFORTS):
        with pytest.raises(TypeError):
            table["x"] = "rtn"  # type: ignore[index]
