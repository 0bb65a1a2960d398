"""The options of ``generate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from microscale.jobs.option import Option, Options, Place
from microscale.jobs.shared_options import CheckpointModel, Dtype, Seed, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions(Options):
    """What is continued, by which model, and how tokens are chosen; a loaded model computes in its own dtype."""

    model: CheckpointModel
    prompt: Annotated[str, Option(help="Text to continue.", place=Place.ARGUMENT)]
    max_new_tokens: Annotated[int, Option(help="Tokens to generate.", short="-n", minimum=1)] = 64
    temperature: Annotated[float, Option(help="0 takes the likeliest token; higher samples.", minimum=0.0)] = 0.0
    top_p: Annotated[float, Option(help="Sample from this probability mass.", minimum=0.0, maximum=1.0)] = 1.0
    dtype: Dtype = "float32"
    seed: Seed = 0
    tokenizer: Tokenizer = None
    on_text: Annotated[
        Callable[[str], None] | None, Option(help="Called with each piece of text as it comes.", place=Place.PYTHON)
    ] = None
