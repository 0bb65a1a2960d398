"""The options of the jobs that have few of them, each a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from microscale.jobs.evaluate_options import TEXT_HELP, Tokens, Window
from microscale.jobs.option import FREE_TEXT, Option, Options, Place
from microscale.jobs.shared_options import (
    CHECKPOINT_HELP,
    CheckpointModel,
    Device,
    DtypeWord,
    OriginalModel,
    Seed,
    TaskData,
    TextOptions,
    Tokenizer,
    TrustRemoteCode,
)

SHORT = TextOptions(samples=8, window=512)
"""A look at a model needs less text than a calibration."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnalyzeOptions(Options):
    """Which model is described, on which text, and which formats' errors are shown."""

    model: Annotated[
        str, Option(help="Directory or hub name of a transformers causal language model.", place=Place.ARGUMENT)
    ]
    calibration: TextOptions = SHORT
    output: Annotated[Path | None, Option(help="The HTML page to write.", short="-o")] = None
    formats: Annotated[
        str, Option(help="Formats WEIGHTS[/ACTIVATIONS] whose error is shown, with commas.", short="-f")
    ] = "mxfp4,mxfp4_plus,nvfp4,mxfp6_e2m3,mxfp6_e3m2,mxfp8,mxint8"
    gradients: Annotated[
        bool,
        Option(
            help="Describe the gradients of weights and of the outputs of linear layers too: about three times the"
            " time, and the hidden states of all layers in a temporary directory."
        ),
    ] = False
    target: Annotated[
        float, Option(help="QSNR in decibels that a recommended format reaches.", minimum=0.0, maximum=120.0)
    ] = 20.0
    device: Device = None
    trust_remote_code: TrustRemoteCode = False


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
    dtype: DtypeWord = "float32"
    seed: Seed = 0
    device: Device = None
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions(Options):
    """Which formats are compared on which model, by which text."""

    model: OriginalModel
    text: Annotated[Path, Option(help=TEXT_HELP, place=Place.REQUIRED)]
    formats: Annotated[
        str | Sequence[str], Option(help="Formats to compare, with commas between them.", command_type=str)
    ] = "mxfp8,mxfp6_e2m3,mxfp4,mxfp4_plus,nvfp4"
    tokens: Tokens = None
    window: Window = 1024
    batch: Annotated[int, Option(help="Windows in one forward call.", minimum=1)] = 4
    full: Annotated[
        bool, Option(help="Also everything: the head, and the products of attention (simulated in floats).")
    ] = False
    html: Annotated[Path | None, Option(help="Also write a page with table and picture.")] = None
    seed: Seed = 0
    tokenizer: Tokenizer = None
    device: Device = None
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainOptions(Options):
    """Whose layers are explained, and where they would run; a loaded model is explained as it lies."""

    model: CheckpointModel
    device: Annotated[
        str | None, Option(help="Device that the model would be on: cpu (default), cuda, cuda:1 …; need not be there.")
    ] = None
    dtype: Annotated[str | None, Option(help="Float type of the layers' inputs (default: the model's).")] = None
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions(Options):
    """What is continued, by which model, and how tokens are chosen; a loaded model computes in its own dtype."""

    model: CheckpointModel
    prompt: Annotated[
        str | None, Option(help="Text to continue, or with --chat to answer.", place=Place.ARGUMENT, kind=FREE_TEXT)
    ] = None
    chat: Annotated[
        bool, Option(help="Answer by the model's chat template; without a prompt, line by line as they are typed.")
    ] = False
    system: Annotated[str | None, Option(help="With --chat: what the model is told first.", kind=FREE_TEXT)] = None
    max_new_tokens: Annotated[int, Option(help="Tokens to generate.", short="-n", minimum=1)] = 64
    temperature: Annotated[float, Option(help="0 takes the likeliest token; higher samples.", minimum=0.0)] = 0.0
    top_p: Annotated[float, Option(help="Sample from this probability mass.", minimum=0.0, maximum=1.0)] = 1.0
    dtype: DtypeWord = "float32"
    seed: Seed = 0
    tokenizer: Tokenizer = None
    on_text: Annotated[
        Callable[[str], None] | None, Option(help="Called with each piece of text as it comes.", place=Place.PYTHON)
    ] = None
    device: Device = None
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOptions(Options):
    """Which checkpoint is looked into."""

    path: Annotated[Path, Option(help="Checkpoint directory.", place=Place.ARGUMENT)]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodsOptions(Options):
    """Which method is shown; all of them where none is named."""

    name: Annotated[str | None, Option(help="A method or a chain, to see it in full.", place=Place.ARGUMENT)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions(Options):
    """Which study is run, how far, and where its results go."""

    file: Annotated[
        Path, Option(help="The study as YAML; docs/guides/evaluation.md has an example.", place=Place.ARGUMENT)
    ]
    results: Annotated[Path | None, Option(help="Results file (default: beside the study, ending in .sqlite).")] = None
    html: Annotated[Path | None, Option(help="The page to write (default: beside the study, ending in .html).")] = None
    only: Annotated[
        tuple[str, ...], Option(help="Run only what matches 'MODEL FORMAT METHOD', e.g. 'mxfp4 gptq'.")
    ] = ()
    retry_failed: Annotated[bool, Option(help="Run again what failed before.")] = False
    report_only: Annotated[bool, Option(help="Run nothing, show what is known.")] = False
    imports: Annotated[
        tuple[str, ...], Option(help="First take the finished runs of another results file.", flag="--import")
    ] = ()
    device: Device = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksOptions(Options):
    """Where the files of tasks are looked for."""

    task_data: TaskData = None
