"""Which runtime ran a model, and how: shared by the jobs ``generate`` and ``bench``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from microscale.integrations.engines import Engine, TransformersEngine
from microscale.kernels import BACKENDS
from microscale.kernels.dispatch import Executions
from microscale.nn.inference import cached_weights
from microscale.planning.executed import Executed, by_name


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeFacts:
    """Who ran a model, why not the decoder runtime, on which level of the machine and with how many threads.

    ``executed`` counts what ran, by operation and backend; ``level`` is that of the backends in it (``none``: no
    kernels).
    """

    runtime: str
    why_not_decoder: str | None
    level: str
    threads: int
    executed: Executed


def runtime_facts(engine: Engine, counts: Executions) -> RuntimeFacts:
    """Return the facts of an engine that ran, with the calls that were counted meanwhile."""
    ran = {backend for _, backend in counts}
    levels = [backend.level() for backend in BACKENDS if backend.name in ran]
    return RuntimeFacts(
        runtime=engine.runtime.value,
        why_not_decoder=engine.why_not_decoder,
        level=" and ".join(filter(None, levels)) or "none",
        threads=torch.get_num_threads(),
        executed=by_name(counts),
    )


def float_weights(engine: Engine) -> contextlib.AbstractContextManager[None]:
    """Keep float copies of packed weights where transformers runs the model; the decoder needs none."""
    return cached_weights(engine.model) if isinstance(engine, TransformersEngine) else contextlib.nullcontext()
