"""Which runtime ran a model, and how: shared by the jobs ``generate`` and ``bench``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from microscale.integrations.engines import Engine, TransformersEngine
from microscale.nn import cached_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeFacts:
    """Who ran a model, why not the decoder runtime, on which level of the machine and with how many threads."""

    runtime: str
    why_not_decoder: str | None
    level: str
    threads: int


def runtime_facts(engine: Engine) -> RuntimeFacts:
    """Return the facts of an engine."""
    return RuntimeFacts(
        runtime=engine.runtime.value,
        why_not_decoder=engine.why_not_decoder,
        level=engine.level,
        threads=torch.get_num_threads(),
    )


def float_weights(engine: Engine) -> contextlib.AbstractContextManager[None]:
    """Keep float copies of packed weights where transformers runs the model; the decoder needs none."""
    return cached_weights(engine.model) if isinstance(engine, TransformersEngine) else contextlib.nullcontext()
