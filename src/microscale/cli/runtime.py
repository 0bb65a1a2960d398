"""Which runtime ran a model, in words and as JSON: shared by ``generate`` and ``bench``."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from rich.markup import escape

from microscale.nn import cached_weights


def engine_facts(engine: Any) -> dict[str, Any]:
    """Return who runs the model, on which level of the machine, and why not the decoder runtime."""
    return {
        "runtime": engine.runtime.value,
        "why_not_decoder": engine.why_not_decoder,
        "level": engine.level,
        "threads": torch.get_num_threads(),
    }


def runtime_text(facts: dict[str, Any]) -> str:
    """Return the facts as one line with markup escaped."""
    threads = f"{facts['threads']} thread" + ("" if facts["threads"] == 1 else "s")
    if facts["why_not_decoder"] is None:
        return f"decoder runtime, {facts['level']}, {threads}"
    return escape(f"transformers, {threads}; not the decoder runtime: {facts['why_not_decoder']}")


def float_weights(engine: Any) -> contextlib.AbstractContextManager[None]:
    """Keep float copies of packed weights where transformers runs the model; the decoder needs none."""
    model = getattr(engine, "model", None)
    return contextlib.nullcontext() if model is None else cached_weights(model)
