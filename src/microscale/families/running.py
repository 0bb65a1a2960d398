"""The one place that calls a model on a batch: by its family's runner, or by the one that its structure asks for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from microscale.errors import ModelError
from microscale.families.batch import Batch, Runner, run_both_sides, run_text
from microscale.families.records import FAMILIES


@functools.cache
def _words(call: Callable[..., Any]) -> frozenset[str] | None:
    """Return the keywords that a function takes, None: any."""
    parameters = inspect.signature(call).parameters
    is_open = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return None if is_open else frozenset(parameters)


def takes(model: Any, word: str) -> bool:
    """Whether a model's forward pass takes a keyword."""
    words = _words(getattr(type(model), "forward", model))
    return words is None or word in words


def runner_of(model: Any) -> Runner:
    """Return what calls a model: the runner in its family's record, else the one that its structure asks for."""
    config: Any = getattr(model, "config", None)
    record = FAMILIES.get(str(getattr(config, "model_type", "")))
    if record is not None and record.runner is not None:
        return record.runner
    is_double = getattr(config, "is_encoder_decoder", False) is True
    return run_both_sides if is_double and takes(model, "decoder_input_ids") else run_text


def run_model(model: Any, batch: Batch, **options: Any) -> Any:
    """Call a model of transformers on a batch, which lies on its device; a cache is made on request alone.

    ``options`` are other keywords of its ``forward``, e.g. ``logits_to_keep``.
    """
    if takes(model, "use_cache"):
        options = {"use_cache": False, **options}
    return runner_of(model)(model, batch, **options)


def predict(model: Any, batch: Batch, **options: Any) -> Float[Tensor, "samples tokens words"]:
    """Return a language model's logits of the next token, as :func:`run_model` has them computed.

    Raises:
        ModelError: the model returns none: it is a base model, a classifier or something else.
    """
    logits = getattr(run_model(model, batch, **options), "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ModelError(
            f"{type(model).__name__} does not predict the next token of a text; scores, text and methods that learn end"
            " to end need a language model (a class such as ...ForCausalLM in config.json)"
        )
    return logits
