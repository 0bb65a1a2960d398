"""Recipes as data: patterns, the word GLOB=WEIGHTS/ACTIVATIONS, YAML files and the line of what is wrong in them."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microscale.errors import FormatError, MicroscaleError, RecipeError
from microscale.formats import NAMED_FORMATS, parse_activation, parse_format
from microscale.recipes.recipe import load_recipe, make_recipe, matches, parse_rule
from recipe_words import make_rule

NAME = "model.layers.10.mlp.down_proj"


@pytest.mark.parametrize(
    "pattern",
    [
        *("*", NAME, "down_proj", "mlp.down_proj", "mlp.*", "*.down_proj", "layers.1?.mlp.*", "*layers.10.*"),
        *("layers.[0-9]*", "model.*", "*.mlp.*", "d*j", "10.mlp.down_pro[jk]"),
    ],
)
def test_patterns_that_match(pattern: str) -> None:
    assert matches(pattern, NAME)


@pytest.mark.parametrize(
    "pattern",
    ["", "proj", "own_proj", "mlp", "layers.1.*", "layers.?.mlp.*", "Down_proj", "down_proj.", "lm_head", "ayers.10.*"],
)
def test_patterns_that_do_not_match(pattern: str) -> None:
    assert not matches(pattern, NAME)


RULES = {
    "*.down_proj=mxfp8": ("*.down_proj", "mxfp8", None),
    "*.down_proj=mxfp8/mxfp4": ("*.down_proj", "mxfp8", "mxfp4"),
    "a=none": ("a", "none", None),
    "a=none/none": ("a", "none", "none"),
    "a=mxfp4/none": ("a", "mxfp4", "none"),
    "a=e2m1/16:e4m3+fp32": ("a", "e2m1/16:e4m3+fp32", None),
    "a=e2m1/16:e4m3/mxfp8": ("a", "e2m1/16:e4m3", "mxfp8"),
    "a=mxfp4/e2m1/16:e4m3": ("a", "mxfp4", "e2m1/16:e4m3"),
    "a=e2m1/16:e8m0:rceil/e4m3/32:e8m0": ("a", "e2m1/16:e8m0:rceil", "e4m3/32:e8m0"),
    "a=mxfp4/nvfp4@ema(0.9)": ("a", "mxfp4", "nvfp4@ema(0.9)"),
    "a=mxfp4/e4m3/tensor:fp32@static": ("a", "mxfp4", "e4m3/tensor:fp32@static"),
    "a=pair(int2/32:fp16:asym,mxfp4,50%)/mxfp8": ("a", "pair(int2/32:fp16:asym,mxfp4,50%)", "mxfp8"),
    "a=mxfp4+sparse0.5%:fp8/mxfp8": ("a", "mxfp4+sparse0.5%:fp8", "mxfp8"),
    "layers.[0-3].*=mxfp4:mse(-1,1)": ("layers.[0-3].*", "mxfp4:mse(-1,1)", None),
}


@pytest.mark.parametrize("text", RULES)
def test_rules_are_split_where_both_sides_are_formats(text: str) -> None:
    pattern, weights, activations = RULES[text]
    assert parse_rule(text) == make_rule(match=pattern, weights=weights, activations=activations)


@given(
    st.sampled_from(sorted(NAMED_FORMATS)), st.sampled_from([*sorted(NAMED_FORMATS), "e3m2/16:e8m0:ceil", "none", None])
)
def test_every_pair_of_formats_comes_back(weights: str, activations: str | None) -> None:
    right = weights if activations is None else f"{weights}/{activations}"
    assert parse_rule(f"*.x={right}") == make_rule(match="*.x", weights=weights, activations=activations)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("down_proj", "GLOB=WEIGHTS"),
        ("=mxfp8", "GLOB=WEIGHTS"),
        ("down_proj=", "GLOB=WEIGHTS"),
        ("", "GLOB=WEIGHTS"),
        ("down_proj=mxfp5", "mxfp5"),
        ("down_proj=mxfp4/mxfp5", "mxfp"),
        ("down_proj=mxfp4@static", "mxfp4@static"),
        ("down_proj=mxfp4/mxfp4@static", "mxfp4"),
        ("down_proj=/mxfp4", "/mxfp4"),
        ("down_proj=mxfp4/", "mxfp4/"),
        ("down_proj=mxfp4//mxfp8", "mxfp4//mxfp8"),
    ],
)
def test_rules_that_are_none(text: str, word: str) -> None:
    with pytest.raises(RecipeError, match="rule") as caught:
        parse_rule(text)
    assert word in str(caught.value)


FULL = """\
# all that a recipe can say
format: mxfp4
activations: mxfp8
method: rtn
include: [lm_head]
exclude:
  - "*.up_proj"
rules:
  - match: "*.down_proj"
    weights: mxfp8
  - match: o_proj
    activations: none
layout: microscale
nan: poison
"""


def test_a_file_and_python_give_the_same(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(FULL)
    made = make_recipe(
        format="mxfp4",
        activations="mxfp8",
        method="rtn",
        include=("lm_head",),
        exclude=("*.up_proj",),
        rules=(make_rule(match="*.down_proj", weights="mxfp8"), make_rule(match="o_proj", activations="none")),
        layout="microscale",
        nan="poison",
    )
    assert load_recipe(file) == load_recipe(str(file)) == made
    assert load_recipe(file).model_dump() == made.model_dump()
    file.write_text("format: mxfp4\n")
    assert load_recipe(file) == make_recipe(format="mxfp4")


WRONG: dict[str, tuple[str, int, str]] = {
    "an unknown key": (
        "format: mxfp4\nfromat: mxfp8\n",
        2,
        "unknown key 'fromat'; did you mean format? known keys: format, activations, ",
    ),
    "a misspelt key that is missing": ("fromat: mxfp8\n", 1, "unknown key 'fromat'; did you mean format?"),
    "no format": ("exclude: [a]\n", 1, "format"),
    "an unknown format": ("\n\nformat: mxfp5\n", 3, "unknown format 'mxfp5'"),
    "a number as format": ("activations: mxfp8\nformat: 4\n", 2, "format"),
    "unknown activations": ("format: mxfp4\nactivations: nvfp4@often\n", 2, "unknown range 'often'"),
    "a range that does not fit": ("format: mxfp4\nactivations: mxfp4@static\n", 2, "mxfp4"),
    "an unknown method": ("format: mxfp4\nmethod: magic\n", 2, "rtn"),
    "an unknown layout": ("format: mxfp4\nlayout: gguf\n", 2, "layout"),
    "an unknown word for NaN": ("format: mxfp4\nnan: skip\n", 2, "nan"),
    "a word in place of a list": ("format: mxfp4\nexclude: down_proj\n", 2, "exclude"),
    "a number in a list": ("format: mxfp4\ninclude:\n  - a\n  - 3\n", 4, "include"),
    "a rule without a pattern": ("format: mxfp4\nrules:\n  - weights: mxfp8\n", 3, "match"),
    "a rule with a wrong format": (
        "format: mxfp4\nrules:\n  - match: a\n    weights: mxfp8\n  - match: b\n    weights: mxfp5\n",
        6,
        "mxfp5",
    ),
    "a rule with an unknown key": (
        "format: mxfp4\nrules:\n  - match: a\n    wieghts: mxfp8\n",
        4,
        "unknown key 'rules.0.wieghts'; did you mean weights? known keys: match, weights, activations, method",
    ),
    "rules that are no list": ("format: mxfp4\nrules:\n  a: mxfp8\n", 2, "rules"),
    "a list": ("- format: mxfp4\n", 1, "begins with 'format: NAME'"),
    "a word": ("mxfp4\n", 1, "begins with 'format: NAME'"),
    "nothing": ("", 1, "begins with 'format: NAME'"),
    "not YAML": ("format: mxfp4\nrules: [\n", 3, "not valid YAML"),
    "a tab": ("format: mxfp4\nrules:\n\t- a\n", 3, "not valid YAML"),
    "a key twice": ("format: mxfp4\nexclude: [a]\nformat: mxfp8\n", 3, "twice"),
    "a rule's key twice": ("format: mxfp4\nrules:\n  - match: a\n    match: b\n", 4, "twice"),
    "a key that is no word": ("format: mxfp4\n3: a\n", 2, "key"),
    "a key that is a list": ("format: mxfp4\n? [a]\n: b\n", 2, "key"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_names_the_line(case: str, tmp_path: Path) -> None:
    text, line, words = WRONG[case]
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    message = str(caught.value)
    assert str(file) in message and words in message
    assert f"line {line}" in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(RecipeError, match="cannot be read"):
            load_recipe(path)


def test_python_values_are_checked_as_well() -> None:
    for fields in (
        {"format": "mxfp5"},
        {"format": "mxfp4", "layout": "gguf"},
        {"format": "mxfp4", "colour": "red"},
        {"format": None},
        {},
        {"format": "mxfp4", "rules": (3,)},
        {"format": "mxfp4", "nan": True},
    ):
        with pytest.raises((RecipeError, FormatError)):
            make_recipe(**fields)


@given(st.text(max_size=60))
def test_any_text_is_a_recipe_or_an_error_of_ours(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text("format: mxfp4\n" + text, encoding="utf-8", errors="replace")
        with contextlib.suppress(MicroscaleError):
            load_recipe(file)


@given(st.text(max_size=30))
def test_any_rule_is_a_rule_or_an_error_of_ours(text: str) -> None:
    try:
        rule = parse_rule(text)
    except MicroscaleError:
        return
    assert rule.weights is not None
    assert rule.weights.record == (None if rule.weights.word == "none" else parse_format(rule.weights.word))
    if rule.activations is not None and rule.activations.word != "none":
        assert rule.activations.record == parse_activation(rule.activations.word)


def test_a_file_of_nearly_this_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("format: mxfp4")
    with pytest.raises(RecipeError, match=r"recip.yaml cannot be read: No such file .*; did you mean recipe.yaml\?$"):
        load_recipe(tmp_path / "recip.yaml")
    with pytest.raises(RecipeError, match=r"cannot be read: No such file or directory$"):
        load_recipe(tmp_path / "absent" / "recipe.yaml")
