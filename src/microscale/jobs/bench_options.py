"""The options of ``bench``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from microscale.jobs.option import Option, Options, Place
from microscale.jobs.shared_options import CHECKPOINT_HELP, Dtype, Seed


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions(Options):
    """Which model is measured, in which formats, and on how many tokens."""

    model: Annotated[str | Path | None, Option(help=CHECKPOINT_HELP, place=Place.ARGUMENT, command_type=str | None)] = (
        None
    )
    random_llama: Annotated[
        str | None,
        Option(help="Bench a random model, e.g. hidden=1536,ffn=4096,layers=12,heads=12,kv_heads=4,vocab=512."),
    ] = None
    format: Annotated[
        str | None, Option(help="Format of the random model's weights (default bfloat16).", short="-f")
    ] = None
    activations: Annotated[
        str | None,
        Option(
            help="Format of layer inputs, or `none`; int8/32:fp32:amax is the fast one. Default: the checkpoint's.",
            short="-a",
        ),
    ] = None
    prompt_tokens: Annotated[int, Option(help="Tokens of the prompt.", minimum=1)] = 256
    new_tokens: Annotated[int, Option(help="Tokens after it, one by one.", short="-n", minimum=1)] = 128
    repeat: Annotated[int, Option(help="How often both are measured.", minimum=1)] = 5
    threads: Annotated[int | None, Option(help="Threads (default: torch's number).", minimum=1)] = None
    cache: Annotated[str, Option(help="Keys and values are kept in float32 or bfloat16.")] = "float32"
    dtype: Dtype = "float32"
    seed: Seed = 0
