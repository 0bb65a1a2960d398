"""Words of dtypes: there and back, and refusals."""

from __future__ import annotations

import re

import pytest
import torch

from microscale.errors import DtypeError
from microscale.formats.dtypes import FLOAT_DTYPES, checked_dtype, dtype_name, named_dtype, parse_dtype


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES, torch.uint8, torch.float8_e4m3fn])
def test_a_word_stands_for_its_dtype(dtype: torch.dtype) -> None:
    assert named_dtype(dtype_name(dtype)) == named_dtype(str(dtype)) == dtype


def test_words_that_name_no_dtype() -> None:
    assert named_dtype("float17") is None and named_dtype("nn") is None


def test_the_floats_that_are_computed_in() -> None:
    assert [parse_dtype(word) for word in ("float32", "bfloat16", "float16")] == list(FLOAT_DTYPES)
    said = "unknown dtype 'float64'; did you mean float16? possible: float32, bfloat16, float16"
    with pytest.raises(DtypeError, match=re.escape(said)):
        parse_dtype("float64")


def test_a_given_dtype_is_a_float() -> None:
    assert checked_dtype(None) is None
    assert checked_dtype("bfloat16") == checked_dtype(torch.bfloat16) == torch.bfloat16
    for given in ("int8", torch.int8, "float17", 16):
        with pytest.raises(DtypeError, match="dtype is a float type of torch"):
            checked_dtype(given)
