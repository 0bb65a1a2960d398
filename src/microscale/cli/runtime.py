"""Which runtime ran a model, in words: shared by ``generate`` and ``bench``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

if TYPE_CHECKING:
    from microscale.jobs.runtime import RuntimeFacts


def runtime_text(facts: RuntimeFacts) -> str:
    """Return the facts as one line with markup escaped."""
    threads = f"{facts.threads} thread" + ("" if facts.threads == 1 else "s")
    if facts.why_not_decoder is None:
        return f"decoder runtime, {facts.level}, {threads}"
    from microscale.planning.executed import linear_words

    return escape(
        f"transformers, {linear_words(facts.executed)}, {threads}; not the decoder runtime: {facts.why_not_decoder}"
    )
