"""`microscale bench`: its table, and errors as a user sees them."""

from __future__ import annotations

import pytest

from command_line import fail, microscale_command
from microscale.kernels.cpu import native

SHAPE = "hidden=64,ffn=96,layers=2,heads=4,kv_heads=2,vocab=32"
FEW = ("--prompt-tokens", "9", "-n", "3", "--repeat", "2", "--json")
INT8 = "int8/32:fp32:amax"

needs_kernels = pytest.mark.skipif(native.NATIVE is None, reason="the compiled kernels are not installed")


def test_counts_begin_at_one() -> None:
    for option in ("--prompt-tokens", "--new-tokens", "--repeat", "--threads"):
        assert microscale_command("bench", "--random-llama", SHAPE, option, "0").code == 2


def test_what_is_refused() -> None:
    assert "give a model, or --random-llama" in fail("bench")
    assert "--format belongs to --random-llama" in fail("bench", "somewhere/x/y", "--format", "mxfp4")
