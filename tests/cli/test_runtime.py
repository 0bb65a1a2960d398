"""Which runtime ran a model, in one line."""

from __future__ import annotations

import pytest
from rich.text import Text

from microscale.cli.runtime import runtime_text
from microscale.jobs.runtime import RuntimeFacts

CALLS = {"linear": {"cpu": 3, "reference": 1}}


@pytest.mark.parametrize(
    ("threads", "reason", "words"),
    [
        (1, None, "decoder runtime, avx2, 1 thread"),
        (2, None, "decoder runtime, avx2, 2 threads"),
        (
            4,
            "it has [odd] layers",
            "transformers, 3 of 4 linear calls on the CPU kernels, 1 on the reference path in torch, 4 threads; not the"
            " decoder runtime: it has [odd] layers",
        ),
    ],
)
def test_one_line(threads: int, reason: str | None, words: str) -> None:
    facts = RuntimeFacts(runtime="r", why_not_decoder=reason, level="avx2", threads=threads, executed=CALLS)
    assert Text.from_markup(runtime_text(facts)).plain == words
