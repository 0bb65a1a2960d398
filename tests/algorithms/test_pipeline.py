"""Chains from their words: order, options, what a chain needs, budgets, and the words of every refusal."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microscale.algorithms.contract import Step
from microscale.algorithms.gptq import Gptq
from microscale.algorithms.hadamard import Hadamard
from microscale.algorithms.low_rank import LowRankStep
from microscale.algorithms.pipeline import beside_segments, make_pipeline, parse_method, read_method, with_budget
from microscale.algorithms.registry import METHODS, STEPS
from microscale.algorithms.rtn import Rtn
from microscale.errors import RecipeError
from microscale.formats import parse_activation, parse_format


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("gptq", "gptq"),
        (" gptq ", "gptq"),
        ("hadamard + gptq", "hadamard+gptq"),
        ("hadamard", "hadamard+rtn"),  # what rounds is added
        ("lowrank:rank=4", "rtn+lowrank:rank=4"),  # before the side path, which needs it
        ("hadamard+lowrank", "hadamard+rtn+lowrank"),  # within a chain the word is the step, not the named chain
        ("gptq:damp=0.01", "gptq"),  # a default is not said
        ("gptq:damp=0.5,order=0", "gptq:damp=0.5,order=false"),
        ("gptq:order=TRUE", "gptq"),
        ("rtn-search", "rtn:search=true"),
        ("hadamard+rtn-weighted", "hadamard+rtn:weighted=true"),
        ("rule:weights=mse(-1,1)+gptq", "rule:weights=mse(-1,1)+gptq"),  # commas in parentheses divide nothing
    ],
)
def test_words_and_the_full_text(words: str, text: str) -> None:
    found = parse_method(words)
    assert found.text == text and parse_method(text) == found


@pytest.mark.parametrize("damp", [1e9, 0.012345678, 1e-7, 2.0])
def test_numbers_last_through_the_text_of_a_chain(damp: float) -> None:
    text = parse_method(f"gptq:damp={damp!r}".replace("e+", "e")).text
    assert parse_method(text).text == text and parse_method(text).rounding == Gptq(damp=damp)


def values(default: object) -> st.SearchStrategy[Any]:
    """Return values of the kind of a default, as options take them."""
    if isinstance(default, bool):
        return st.booleans()
    return st.floats(0, 1e9) if isinstance(default, float) else st.integers(0, 500)


@settings(max_examples=60)
@given(data=st.data())
def test_any_options_last_through_the_text(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(STEPS.values())))
    fields = [field for field in dataclasses.fields(kind) if not isinstance(field.default, str)]
    options = {field.name: data.draw(values(field.default)) for field in fields}
    try:
        step: Step = kind(**options)
    except RecipeError:
        return
    chain = make_pipeline([step])
    assert parse_method(chain.text) == chain, chain.text


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("", "unknown method or step ''; methods: best, rtn, "),
        ("gptq+", "unknown method or step ''"),
        ("GPTQ", "unknown method or step 'GPTQ'"),
        ("auto", "auto is no step of a chain: it finds the formats of all layers under a budget"),
        ("hadamard+auto", "auto is no step of a chain"),
        ("gptq:damp", "step gptq: 'damp' is no option of it; options and defaults: damp=0.01"),
        ("gptq:dump=1", "step gptq: 'dump=1' is no option of it"),
        ("gptq:damp=much", "step gptq: damp must be a number like 0.01, got 'much'"),
        ("gptq:order=yes", "step gptq: order must be true or false, got 'yes'"),
        ("hadamard:size=3.5", "step hadamard: size must be a number like 32, got '3.5'"),
        ("hadamard:size=", "step hadamard: size must be a number like 32, got ''"),
        ("gptq+rtn", "method 'gptq+rtn' rounds more than once (gptq, rtn); keep one of these steps"),
        ("gptq+hadamard", "method 'gptq+hadamard': its steps must come in the order hadamard then gptq"),
        ("lowrank+gptq", "must come in the order gptq then lowrank"),
        ("rtn+rule", "must come in the order rule then rtn"),
        ("autoround+gptq", "method 'autoround+gptq': rtn must follow autoround, not gptq"),
        ("best+gptq", "method 'best+gptq' rounds more than once (gptq, gptq)"),
        ("micromix+permute", "permute cannot stand beside micromix"),
    ],
)
def test_what_makes_no_sense_is_told(words: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_method(words)
    assert problem in str(caught.value)


def test_an_unknown_effort() -> None:
    for words in ("best", "gptq"):
        with pytest.raises(RecipeError, match=r"^unknown effort 'some'; possible: fast, good, max$"):
            parse_method(words, effort="some")


def test_what_was_read_passes_through() -> None:
    method = read_method("hadamard+gptq")
    assert read_method(method) is method and str(method) == method.text == "hadamard+gptq"
    chain = method.pipeline()
    again = read_method(chain)
    assert again.text == chain.text and again.pipeline() == chain


def test_best_waits_for_effort_and_format() -> None:
    method = read_method("best")
    assert method.steps == (None,) and str(method) == "best"
    texts = {method.pipeline(effort=e, fmt=parse_format(f)).text for e in ("fast", "good") for f in ("mxfp4", "nvfp4")}
    assert len(texts) == 4
    assert read_method("best+lowrank").pipeline().steps[-1] == LowRankStep()


def test_steps_by_kind() -> None:
    chain = parse_method("hadamard:size=16+hadamard:size=32+gptq+lowrank")
    assert chain.of_kind(Hadamard) == (Hadamard(size=16), Hadamard(size=32))
    assert chain.rounding == Gptq() and chain.of_kind(Rtn) == ()
    with pytest.raises(RecipeError, match="must come in the order"):
        make_pipeline([Gptq(), Hadamard()])
    assert make_pipeline([]).steps == (Rtn(),)


NEEDS = {  # needs calibration text, sees inputs layer by layer, keeps something for run time
    "rtn": (False, False, False),
    "rtn-search": (False, False, False),
    "rtn-weighted": (True, True, False),
    "threshold": (False, False, False),
    "gptq": (True, True, False),
    "hadamard": (False, False, True),
    "mr-gptq": (True, True, True),
    "quarot": (True, True, True),
    "spinquant": (True, True, True),
    "spinquant+rtn": (True, False, False),
    "quarot+rtn": (False, False, False),
    "smoothquant": (True, True, False),
    "permute": (True, True, True),
    "qad": (True, False, True),
    "distill:transform=none": (True, False, False),
    "lowrank": (True, True, True),
    "autoround": (True, True, False),
    "omniquant": (True, True, True),
    "mxplus": (False, False, False),
}


@pytest.mark.parametrize("words", NEEDS)
def test_what_a_chain_needs(words: str) -> None:
    chain = parse_method(words)
    assert (chain.needs_calibration, chain.is_streamed, chain.is_online) == NEEDS[words]


@pytest.mark.parametrize(
    ("words", "fmt", "problem"),
    [
        ("mxplus+rtn", "int4_asym", "step mxplus cannot quantize to int4_asym: "),
        ("micromix", "adaptive_2_4", "step micromix cannot quantize to adaptive_2_4: "),
        ("hadamard+gptq", "int4_asym", None),
    ],
)
def test_a_refusal_names_step_and_format(words: str, fmt: str, problem: str | None) -> None:
    found = parse_method(words).refusal(parse_format(fmt), None)
    assert found is None if problem is None else str(found).startswith(problem)


def test_idle_steps_are_told_after_what_came_before() -> None:
    """The second rule meets what the first has made."""
    fmt = parse_format("mxfp4")
    twice = parse_method("rule:weights=rceil+rule:weights=rceil+rtn:search=true")
    assert twice.idleness(fmt, None) == ["step rule changes nothing for mxfp4:rceil: it has the rule rceil already"]
    assert twice.adapt(fmt, parse_activation("mxfp4"))[0] == parse_format("mxfp4:rceil")
    both = parse_method("permute+rtn:search=true").idleness(parse_format("e2m1/tensor:fp32"), None)
    assert [text.split()[1] for text in both] == ["permute", "rtn"]


def test_a_budget_for_a_chain() -> None:
    assert with_budget(read_method("micromix"), 5.0).text == "micromix:bits=5+rtn"
    assert with_budget(read_method("adaptive-2-4"), 3.5).text == "micromix:wider=(int4/32:fp16:asym,mxfp8),bits=3.5+rtn"
    assert with_budget(read_method("smoothquant+micromix:bits=5+gptq"), 5.0).text == "smoothquant+micromix:bits=5+gptq"
    for method, words in (("gptq", "has no budget"), ("micromix:bits=6", "has bits=6 already")):
        with pytest.raises(RecipeError, match=words):
            with_budget(read_method(method), 5.0)


def test_who_has_a_budget_is_told() -> None:
    with pytest.raises(RecipeError) as caught:
        with_budget(read_method("gptq"), 4.5)
    spending = [name for name in METHODS if "micromix" in METHODS[name]]
    listed = ", ".join(["auto", *spending[:-1]]) + f" and {spending[-1]} have one"
    assert str(caught.value) == f"method gptq has no budget, so 4.5 bits say nothing to it; {listed}"
    with pytest.raises(RecipeError, match=re.escape("method micromix:bits=6 has bits=6 already; leave one of the two")):
        with_budget(read_method("micromix:bits=6"), 5.0)


@pytest.mark.parametrize(
    ("own", "common", "text"),
    [
        ("gptq", "rule+hadamard+rtn", "gptq"),  # without segments its own chain is all
        ("micromix", "gptq", "micromix+gptq"),
        ("micromix", "rule+smoothquant+hadamard+gptq", "rule+smoothquant+micromix+gptq"),
        ("micromix+gptq", "rule+rtn:search=true", "rule+micromix+gptq"),
        ("smoothquant:alpha=0.3+micromix", "awq+gptq", "smoothquant:alpha=0.3+micromix+gptq"),
        ("micromix", "distill:transform=none+rtn", "micromix+distill:transform=none+rtn"),
        ("micromix", "distill+rtn", "micromix+rtn"),
        ("micromix", "autoround+rtn", "micromix+autoround+rtn"),
        ("micromix+gptq", "autoround+rtn", "micromix+gptq"),  # what must be followed by rtn cannot be
        ("micromix", "quarot+gptq+lowrank", "micromix+gptq+lowrank"),
    ],
)
def test_steps_beside_segments(own: str, common: str, text: str) -> None:
    assert beside_segments(parse_method(own), parse_method(common)).text == text
