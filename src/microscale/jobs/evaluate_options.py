"""The options of ``eval``, and those of them that ``compare`` shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from microscale.jobs.option import MODEL, Option, Options
from microscale.jobs.shared_options import (
    AttentionOptions,
    CheckpointModel,
    Device,
    DtypeWord,
    Seed,
    TaskData,
    Tokenizer,
    TrustRemoteCode,
)

TEXT_HELP = "UTF-8 text file to score."
Tokens = Annotated[int | None, Option(help="Use only the first N text tokens (the text must have as many).")]
Window = Annotated[int, Option(help="Tokens in a window, BOS included.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions(Options):
    """What is scored, on what and how; at least one of ``text`` and ``tasks``.

    A loaded model computes in its own dtype.
    """

    model: CheckpointModel
    text: Annotated[Path | None, Option(help=TEXT_HELP)] = None
    tokens: Tokens = None
    window: Window = 1024
    batch: Annotated[int | None, Option(help="Windows (4) or task requests (16) in one forward call.", minimum=1)] = (
        None
    )
    dtype: DtypeWord = "float32"
    rounding: AttentionOptions = field(default_factory=AttentionOptions)
    reference: Annotated[
        Any,
        Option(
            help="Also score this model (the original): KL divergence, top-1 agreement.",
            command_type=str | None,
            kind=MODEL,
        ),
    ] = None
    layers: Annotated[bool, Option(help="With --reference: also the error of every decoder layer's output.")] = False
    tasks: Annotated[
        str | Sequence[str] | None,
        Option(
            help="Tasks to run through lm-eval, with commas between them; see `microscale tasks`.",
            command_type=str | None,
        ),
    ] = None
    task_data: TaskData = None
    limit: Annotated[
        int | None, Option(help="Only the first N documents of each task (or part of a group).", minimum=1)
    ] = None
    num_fewshot: Annotated[
        int | None, Option(help="Answered examples in each prompt (default: the task's).", minimum=0)
    ] = None
    allow_code_execution: Annotated[
        bool, Option(help="Run programs that the model writes (HumanEval). They have your rights.")
    ] = False
    seed: Seed = 0
    tokenizer: Tokenizer = None
    device: Device = None
    trust_remote_code: TrustRemoteCode = False
