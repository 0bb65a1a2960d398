"""Every public function, given an argument of a wrong kind, ends in an error of ours that says what was expected.

``CALLS`` holds a call that works for each function; each of its arguments is replaced by everything in ``WRONG`` that
is not named as possible beside it.
"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import microscale
from microscale import formats, kernels
from microscale.errors import (
    DtypeError,
    FormatError,
    KernelError,
    MicroscaleError,
    OptionError,
    RecipeError,
    StudyError,
)
from microscale.formats import codec
from microscale.formats.elements import E8M0, FP16
from microscale.formats.grammar import parse_scale_rule
from microscale.jobs.front import signature_of
from microscale.jobs.quantize_options import QuantizeOptions
from microscale.kernels.grid import make_grid
from microscale.recipes.recipe import Recipe, RecipeRule, load_recipe, make_recipe, parse_rule
from microscale.studies.file import StudyModel, StudyTask
from microscale.tensor import QuantizedTensor, join_cols, join_rows

TENSOR = kernels.quantize(torch.ones(4, 64), "mxfp4")
VALUES, ROW, WIDE = torch.ones(4, 64), torch.ones(4), torch.ones(64)
FORMAT = formats.parse_format("mxfp4")
ELEMENT = formats.NAMED_ELEMENTS["e2m1"]
CODES = torch.zeros(4, 64, dtype=torch.uint8)
REQUEST = kernels.Request(
    operation=kernels.Operation.QUANTIZE,
    format=FORMAT,
    device=torch.device("cpu"),
    dtype=torch.float32,
    layout="row_major",
)

WRONG: dict[str, Any] = {
    "none": None,
    "whole": 7,
    "negative": -1,
    "number": 1.5,
    "true": True,
    "word": "nonsense",
    "empty": "",
    "bytes": b"x",
    "list": [],
    "items": [1],
    "nones": [None],
    "map": {},
    "object": object(),
    "type": int,
    "vector": torch.ones(2),
    "scalar": torch.tensor(1.0),
    "codes": torch.full((4, 64), 300, dtype=torch.int32),
    "complex": torch.zeros(4, 64, dtype=torch.complex64),
    "array": np.zeros((4, 64), np.float32),
    "tensor": TENSOR,
    "format": FORMAT,
    "element": ELEMENT,
    "float64": torch.float64,
    "int64": torch.int64,
}

Call = tuple[Callable[..., Any], dict[str, Any], dict[str, str]]
FMT = "format"
AMAX = "none scalar vector"
CALLS: list[Call] = [
    (
        kernels.quantize,
        {"values": VALUES, "fmt": "mxfp4", "amax": None, "draw": None, "name": "x"},
        {"values": "vector", "fmt": FMT, "amax": AMAX, "draw": "none", "name": "word empty"},
    ),
    (
        kernels.fake_quantize,
        {"values": VALUES, "fmt": "mxfp4", "amax": None, "draw": None, "name": "x"},
        {"values": "vector", "fmt": FMT, "amax": AMAX, "draw": "none", "name": "word empty"},
    ),
    (
        kernels.dequantize,
        {"tensor": TENSOR, "dtype": None, "out": None},
        {"tensor": "tensor", "dtype": "none float64", "out": "none"},
    ),
    (
        kernels.linear,
        {"inputs": VALUES, "weight": TENSOR, "bias": ROW, "activations": "mxfp8"},
        {"weight": "tensor", "bias": "none", "activations": "none format"},
    ),
    (
        kernels.linear_mixed,
        {"inputs": VALUES, "weights": [TENSOR], "activations": ["mxfp8"], "bias": ROW},
        {"activations": "nones", "bias": "none"},
    ),
    (
        kernels.rms_norm,
        {"values": VALUES, "weight": WIDE, "eps": 1e-5},
        {"eps": "whole negative number"},
    ),
    (
        kernels.rms_norm_quantize,
        {"values": VALUES, "weight": WIDE, "eps": 1e-5, "fmt": "mxfp4"},
        {"eps": "whole negative number", "fmt": FMT},
    ),
    (kernels.silu_mul, {"gate": VALUES, "up": VALUES}, {}),
    (kernels.silu_mul_quantize, {"gate": VALUES, "up": VALUES, "fmt": "mxfp4"}, {"fmt": FMT}),
    (kernels.hadamard, {"values": VALUES, "size": 32, "signs": WIDE}, {"signs": "none"}),
    (
        kernels.hadamard_quantize,
        {"values": VALUES, "size": 32, "fmt": "mxfp4", "signs": WIDE},
        {"fmt": FMT, "signs": "none"},
    ),
    (kernels.gather_quantize, {"values": VALUES, "columns": torch.arange(32), "fmt": "mxfp4"}, {"fmt": FMT}),
    (kernels.to_layout, {"tensor": TENSOR, "name": "row_major"}, {"tensor": "tensor"}),
    (
        kernels.preferred_layout,
        {"tensor": TENSOR, "dtype": torch.float32, "activations": None, "device": None},
        {"tensor": "tensor", "dtype": "float64", "activations": "none format", "device": "none"},
    ),
    (
        kernels.is_at_home,
        {"layout": "row_major", "fmt": FORMAT, "dtype": torch.float32, "device": torch.device("cpu")},
        {"layout": "word empty", "fmt": FMT, "dtype": "float64 int64"},
    ),
    (
        kernels.make_cache,
        {
            "stored": "mxfp4",
            "positions": 8,
            "kv_heads": 2,
            "head_dim": 4,
            "length": torch.tensor([0]),
            "dtype": torch.float32,
        },
        {"stored": "format float64", "positions": "whole", "kv_heads": "whole", "dtype": "float64"},
    ),
    (kernels.largest_index, {"numbers": ROW}, {"numbers": "vector"}),
    (kernels.bind, {"calls": []}, {"calls": "list"}),
    (kernels.why_not, {"request": REQUEST}, {}),
    (kernels.add_backend, {"backend": kernels.BACKENDS[0]}, {}),
    (kernels.remove_backend, {"name": "cpu"}, {}),
    (make_grid, {"weight": VALUES, "fmt": FORMAT}, {"fmt": FMT}),
    (formats.parse_format, {"spec": "mxfp4"}, {"spec": FMT}),
    (formats.format_name, {"fmt": FORMAT}, {"fmt": FMT}),
    (formats.parse_weights, {"given": "mxfp4"}, {"given": FMT}),
    (formats.parse_inputs, {"given": "mxfp8"}, {"given": FMT}),
    (formats.parse_weights_and_inputs, {"text": "mxfp4/mxfp8"}, {}),
    (formats.spec_text, {"fmt": FORMAT}, {"fmt": FMT}),
    (formats.parse_activation, {"spec": "mxfp8"}, {"spec": FMT}),
    (
        formats.float_element,
        {"exponent_bits": 2, "mantissa_bits": 1, "bias": None, "specials": None, "signed": True},
        {
            "exponent_bits": "whole",
            "mantissa_bits": "whole",
            "bias": "none whole negative",
            "specials": "none",
            "signed": "true",
        },
    ),
    (
        formats.int_element,
        {"bits": 4, "fraction_bits": None, "symmetric": True},
        {"bits": "whole", "fraction_bits": "none whole negative", "symmetric": "true"},
    ),
    (
        formats.uint_element,
        {"bits": 4, "fraction_bits": 0},
        {"bits": "whole", "fraction_bits": "whole negative"},
    ),
    (
        formats.power_of_two_scale,
        {"exponent_bits": 8, "bias": None},
        {"exponent_bits": "whole", "bias": "none"},
    ),
    (formats.tensor_place, {"name": "x"}, {"name": "word empty"}),
    (formats.list_items, {"text": "a,b"}, {"text": "word empty"}),
    (formats.split_outside, {"text": "a,b", "separator": ","}, {"text": "word empty", "separator": "word empty"}),
    (parse_scale_rule, {"word": "floor", "scale": E8M0}, {"scale": "element"}),
    (
        codec.encode,
        {
            "values": VALUES,
            "element": ELEMENT,
            "rounding": formats.Rounding.STOCHASTIC,
            "overflow": formats.Overflow.SATURATE,
            "noise": torch.zeros(4, 64, dtype=torch.int64),
        },
        {"element": "element", "noise": "codes"},
    ),
    (codec.decode, {"codes": CODES, "element": ELEMENT}, {"element": "element"}),
    (codec.encode_scale, {"raw": VALUES, "scale": E8M0}, {"raw": "vector scalar", "scale": "element"}),
    (codec.encode_scale_up, {"raw": VALUES, "scale": E8M0}, {"raw": "vector scalar", "scale": "element"}),
    (codec.decode_scale, {"stored": CODES, "scale": E8M0}, {"scale": "element"}),
    (codec.decode_scale, {"stored": VALUES.half(), "scale": FP16}, {"stored": "vector scalar"}),
    (codec.random_bits, {"indices": torch.arange(4), "draw": formats.Draw()}, {"indices": "codes"}),
    (
        codec.round_to_int,
        {"values": VALUES, "rounding": formats.Rounding.NEAREST_EVEN, "noise": None},
        {"values": "vector scalar", "noise": "none codes"},
    ),
    (codec.value_table, {"element": ELEMENT, "device": "cpu"}, {"element": "element"}),
    (TENSOR.slice_rows, {"begin": 0, "end": 2}, {}),
    (TENSOR.slice_cols, {"begin": 0, "end": 32}, {}),
    (TENSOR.select_rows, {"rows": torch.tensor([1])}, {}),
    (TENSOR.to, {"device": "cpu"}, {}),
    (join_rows, {"tensors": [TENSOR, TENSOR]}, {}),
    (join_cols, {"tensors": [TENSOR, TENSOR], "fmt": None}, {"fmt": "none"}),
    (
        QuantizedTensor,
        {"format": FORMAT, "shape": (4, 64), "dtype": torch.float32, "parts": TENSOR.parts, "layout": "row_major"},
        {"format": FMT, "dtype": "float64 int64"},
    ),
    (parse_rule, {"text": "a=mxfp4"}, {}),
    (load_recipe, {"path": __file__}, {}),
]


def _name(call: Call) -> str:
    return f"{call[0].__qualname__}-{'-'.join(call[1])}"


@pytest.mark.parametrize("call", CALLS, ids=_name)
def test_wrong_kinds_of_arguments(call: Call) -> None:
    function, right, possible = call
    for name in right:
        for word, value in WRONG.items():
            if word in possible.get(name, "").split():
                continue
            try:
                function(**{**right, name: value})
            except MicroscaleError as error:
                assert len(str(error)) > 20, (name, word, str(error))
            except Exception as error:
                pytest.fail(f"{name}={word}: {type(error).__name__}: {error}")
            else:
                pytest.fail(f"{name}={word} is taken")


@pytest.mark.parametrize("call", CALLS, ids=_name)
def test_right_kinds_of_arguments(call: Call) -> None:
    """What the table calls possible is, so that the other test tells of nothing but the replaced argument."""
    function, right, possible = call
    if function not in (load_recipe, kernels.add_backend, kernels.remove_backend):
        function(**right)
    for name, words in possible.items():
        for word in words.split():
            function(**{**right, name: WRONG[word]})


def _functions(room: Any) -> set[Callable[..., Any]]:
    found = [getattr(room, name) for name in room.__all__]
    return {each for each in found if inspect.isfunction(each)}


ELSEWHERE = {"count_executions"}
"""Without arguments that a user gives."""


def test_every_public_function_is_in_the_table() -> None:
    named = {call[0] for call in CALLS}
    missing = {each.__name__ for room in (formats, kernels) for each in _functions(room) - named}
    assert missing == ELSEWHERE


@pytest.mark.parametrize(
    "function, arguments",
    [(microscale.load, 1), (microscale.load_tokenizer, 1), (microscale.save, 2), (microscale.quantize_attention, 1)],
)
@pytest.mark.parametrize("word", ["none", "whole", "true", "list", "map", "bytes", "object", "type", "vector"])
def test_wrong_kinds_of_models_and_paths(function: Callable[..., Any], arguments: int, word: str) -> None:
    with pytest.raises(MicroscaleError, match=r"must be .* got|expected"):
        function(*[WRONG[word]] * arguments)


def test_the_text_says_what_was_expected_and_what_came() -> None:
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: microscale.quantize_tensor(VALUES, cast(Any, None)), FormatError, "a format must be a name.*got None"),
        (lambda: microscale.dequantize_tensor(cast(Any, VALUES)), TypeError, "must be a QuantizedTensor.*got a value"),
        (lambda: codec.decode(CODES + 16, ELEMENT), FormatError, "codes of e2m1 are 0 to 15, got 16 to 16"),
        (lambda: codec.decode(CODES.float(), ELEMENT), DtypeError, r"codes of e2m1 .* integers, got a torch.float32"),
        (lambda: codec.encode(VALUES.double(), ELEMENT), DtypeError, r"float32 tensor, got a torch.float64 tensor"),
        (lambda: TENSOR.select_rows(torch.tensor([9])), IndexError, "rows 0 to 3 of this tensor, got 9 to 9"),
    ]
    for call, error, text in cases:
        with pytest.raises(error, match=text):
            call()


# ---------------------------------------------------------------------------------------------------- records

BLOCK = formats.BlockFormat
RECORDS: list[tuple[type[Any], dict[str, Any]]] = [
    (formats.VectorBlock, {"size": 32}),
    (formats.TileBlock, {"rows": 2, "cols": 2}),
    (formats.SubScale, {"size": 8, "bits": 2, "kind": formats.SubScaleKind.LINEAR}),
    (formats.SparseTable, {"percent": 1.0, "element": formats.SparseElement.FP8}),
    (formats.Segment, {"format": FORMAT, "cols": 32}),
    (formats.SegmentedFormat, {"segments": (formats.Segment(format=cast(Any, FORMAT), cols=32),)}),
    (formats.ScaleRule, {"kind": formats.RuleKind.PRESCALE, "arguments": (0.5,)}),
    (formats.ActivationSpec, {"format": FORMAT, "range": formats.RangeKind.DYNAMIC, "argument": 0.0}),
    (formats.PairFormat, {"low": FORMAT, "high": FORMAT, "high_percent": 50.0, "sparse": None}),
    (BLOCK, {name: getattr(FORMAT, name) for name in BLOCK.__dataclass_fields__}),
    (formats.Draw, {"seed": 0, "step": 0, "place": 0}),
]


@pytest.mark.parametrize("record, fields", RECORDS, ids=lambda each: getattr(each, "__name__", ""))
def test_wrong_kinds_of_fields(record: type[Any], fields: dict[str, Any]) -> None:
    assert record(**fields) is not None
    for name in fields:
        for word in ("bytes", "object", "type", "list", "map", "vector", "word", "float64"):
            with pytest.raises(FormatError, match=name):
                record(**{**fields, name: WRONG[word]})


RECIPE_WRONG: dict[str, Any] = {
    **{word: WRONG[word] for word in ("whole", "number", "true", "map", "object", "nones", "items", "word")},
    "bad bytes": b"\xff",
    "words": [["x"]],
    "rule": [{"match": 1}],
    "half a rule": [{"weights": "mxfp4"}],
    "weights": [{"match": "x", "weights": 1}],
    "inputs": [{"match": "x", "weights": "mxfp4", "activations": []}],
    "method": [{"match": "x", "weights": "mxfp4", "method": 3}],
    "text": ["x=mxfp4"],
}


@pytest.mark.parametrize("field", Recipe.model_fields)
@pytest.mark.parametrize("word", RECIPE_WRONG)
def test_recipes_of_wrong_kinds(field: str, word: str) -> None:
    """An error of ours in words of ours; pydantic's begin with "Input should be"."""
    fields: dict[str, Any] = {"format": "mxfp4", field: RECIPE_WRONG[word]}
    if field in ("include", "exclude") and word == "text":
        assert make_recipe(**fields)
        return
    with pytest.raises((RecipeError, FormatError)) as caught:
        make_recipe(**fields)
    text = str(caught.value)
    assert "nput should" not in text and "Field required" not in text and "pydantic" not in text, text
    assert field in text or "nonsense" in text


def test_a_recipe_needs_its_format_and_a_rule_its_pattern() -> None:
    with pytest.raises(RecipeError, match="format: is missing; a recipe needs a format"):
        make_recipe()
    with pytest.raises(RecipeError, match=r"rules\.0\.match: is missing.*a rule what it matches"):
        make_recipe(format="mxfp4", rules=[{"weights": "mxfp4"}])
    assert set(RecipeRule.model_fields) == {"match", "weights", "activations", "method"}
    made = Recipe(format=cast(Any, "mxfp4"), rules=(RecipeRule(match="x", weights=cast(Any, "mxfp8")),))
    assert pickle.loads(pickle.dumps(made)) == made == Recipe.model_validate(made.model_dump())
    assert made.model_copy(update={"layout": "quark"}).layout == "quark"


@pytest.mark.parametrize(
    ("record", "fields", "error"),
    [
        (Recipe, {"format": 3}, RecipeError),
        (Recipe, {"format": "mxfp4", "rules": [{"match": 1}]}, RecipeError),
        (RecipeRule, {"match": 3}, RecipeError),
        (RecipeRule, {"mach": "x"}, RecipeError),
        (StudyModel, {}, StudyError),
        (StudyTask, {}, StudyError),
        (StudyTask, {"task": 3}, StudyError),
    ],
)
def test_a_record_of_a_file_made_of_wrong_kinds(record: type[Any], fields: dict[str, Any], error: type[Any]) -> None:
    with pytest.raises(error) as caught:
        record(**fields)
    assert "nput should" not in str(caught.value) and "pydantic" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- jobs

NUL = "a\x00b"
PATHS = ["", NUL, "\ud800", 3, True, [], b"x", int]
WORDS = ["", True, 3, np.array([1, 2]), torch.ones(2), b"x"]
TOKENIZERS = ["", "x", 3, True, [], {}, np.ones(2), str, len]
MODELS = ["", NUL, None, 3, True, [], {}, object(), np.ones(2), int]
ITEMS = ["", 3, [], np.ones(2)]
NUMBERS = ["1", True, None, [], 10**30, 10**5000, np.ones(2)]
OPTIONS: list[tuple[str, dict[str, Any], dict[str, list[Any]]]] = [
    (
        "quantize",
        {"model": "no model", "format": "mxfp4"},
        {
            **dict.fromkeys(("format", "activations", "attention", "kv_cache", "method"), WORDS),
            **dict.fromkeys(("output", "offload", "recipe"), PATHS),
            **dict.fromkeys(("layout", "effort", "nan", "part", "observer"), ITEMS),
            **dict.fromkeys(("samples", "window", "seed"), NUMBERS),
            **{"tokenizer": TOKENIZERS, "overwrite": ["no", 1, None], "include": ["x", [""], [1], np.ones(2)]},
        },
    ),
    (
        "evaluate",
        {"model": "no model", "text": __file__},
        {
            **{"model": MODELS, "reference": MODELS[3:], "tokenizer": TOKENIZERS, "text": PATHS, "task_data": PATHS},
            **{"layers": ["no", 1], "window": NUMBERS},
        },
    ),
    ("evaluate", {"model": "no model", "text": __file__}, {"task_data": ["/nonexistent"]}),
    (
        "generate",
        {"model": "no model", "prompt": "x"},
        {
            **{"model": MODELS, "prompt": [None, 3, []], "tokenizer": TOKENIZERS, "on_text": ["x", 3]},
            **dict.fromkeys(("temperature", "top_p", "max_new_tokens", "seed"), NUMBERS),
        },
    ),
    ("compare", {"model": "no model", "text": __file__}, {"tokenizer": TOKENIZERS, "text": PATHS, "html": PATHS}),
    ("allocate", {"model": "no model", "budget": "4bits"}, {"tokenizer": TOKENIZERS, "output": PATHS, "plot": PATHS}),
    ("analyze", {"model": "no model"}, {"output": PATHS, "target": NUMBERS}),
    ("bench", {"model": "no model"}, {"model": PATHS, "repeat": NUMBERS}),
    ("explain", {"model": "no model"}, {"model": MODELS, "dtype": ["", 3]}),
    ("inspect", {"path": "no model"}, {"path": PATHS}),
    ("methods", {}, {"name": ["", 3, []]}),
    ("study", {"file": "no study"}, {"file": PATHS, "results": PATHS, "html": PATHS, "imports": [[NUL], "x"]}),
    ("tasks", {}, {"task_data": PATHS}),
]


@pytest.mark.parametrize("name, right, wrong", OPTIONS, ids=lambda each: each if isinstance(each, str) else "")
def test_wrong_kinds_of_options(name: str, right: dict[str, Any], wrong: dict[str, list[Any]]) -> None:
    """Each is refused by name before the model, which is not there, is looked for."""
    for word, values in {**wrong, "progress": [3, "x", []]}.items():
        for value in values:
            with pytest.raises(OptionError) as caught:
                getattr(microscale, name)(**{**right, word: value})
            assert word.replace("_", "-") in str(caught.value).replace("_", "-"), (word, str(caught.value))


@pytest.mark.parametrize(
    "words",
    [
        *({"tokenizer": value} for value in ("path", 3, [], {}, str)),
        *({"layout": value} for value in ([], 3, None)),
        *({"overwrite": value} for value in ("no", 1, None)),
        *({"path": value} for value in ("", NUL)),
    ],
    ids=repr,
)
def test_save_refuses_wrong_kinds(words: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MicroscaleError, match=r"must be .* got"):
        cast(Any, microscale.save)(torch.nn.Linear(2, 2), **{"path": tmp_path / "out", **words})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("function", [microscale.load, microscale.load_tokenizer, load_recipe])
@pytest.mark.parametrize("path", ["", NUL])
def test_what_no_file_is_called(function: Callable[..., Any], path: str) -> None:
    with pytest.raises(MicroscaleError, match="without NUL, got"):
        function(path)


@pytest.mark.parametrize("value", [np.array([1, 2]), torch.ones(2), 3, [], ""])
def test_quantize_attention_refuses_wrong_kinds(value: Any) -> None:
    for side in ("attention", "kv_cache"):
        with pytest.raises(MicroscaleError):
            microscale.quantize_attention(torch.nn.Linear(2, 2), **{side: value})


def test_quantize_names_its_options() -> None:
    words = list(inspect.signature(microscale.quantize).parameters)
    assert words[:2] == ["model", "format"]
    assert set(words) == set(signature_of(QuantizeOptions).parameters) and "options" not in words


@pytest.mark.parametrize("field", ["seed", "step", "place"])
def test_a_draw_takes_whole_numbers_of_any_size_from_0_on(field: str) -> None:
    assert formats.Draw(**{field: 2**70}) is not None, "a seed in a spec may have any size"
    with pytest.raises(FormatError, match=f"the {field} of a draw must be a whole number from 0 on"):
        formats.Draw(**{field: -1})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", value) for value in (3, "", " ", None)),
        *(("title", value) for value in (3, "")),
        *(("rank", value) for value in ("1", True, float("nan"), float("inf"), None)),
        *(("why_not", value) for value in (None, "x")),
        *(("implementations", value) for value in (None, [], {"linear": len}, {kernels.Operation.LINEAR: 3})),
    ],
)
def test_a_backend_of_wrong_kinds(field: str, value: Any) -> None:
    before = list(kernels.BACKENDS)
    right = dataclasses.replace(before[0], name="new", layouts=())
    with pytest.raises(KernelError, match=f"{field}.* must be .*got"):
        kernels.add_backend(dataclasses.replace(right, **{field: value}))
    assert before == kernels.BACKENDS
