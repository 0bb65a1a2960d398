"""The options of ``allocate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from microscale.jobs.option import Option, Options, Place
from microscale.jobs.shared_options import Device, OriginalModel, Source, TextOptions, Tokenizer, TrustRemoteCode

DEFAULT_CANDIDATES = "mxfp4,mxfp4_plus,nvfp4,mxfp6_e2m3,mxfp8"
"""What layers may be given where nothing is named."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuringText(TextOptions):
    """What sensitivity is measured on: little text tells layers apart."""

    source: Annotated[
        Source | None,
        Option(
            help="Text file, JSON lines or dataset name to measure on.", word="calibration", command_type=str | None
        ),
    ] = None
    samples: Annotated[int, Option(help="Windows that are measured on.", minimum=1)] = 8
    window: Annotated[int, Option(help="Tokens in a window, BOS included.", minimum=2)] = 512


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AllocateOptions(Options):
    """Which formats layers may get, under which budget, and how their sensitivity is measured."""

    model: OriginalModel
    budget: Annotated[str, Option(help="4.5bits, 1.2GB (whole model) or 20ms.", short="-b", place=Place.REQUIRED)]
    output: Annotated[Path | None, Option(help="The recipe to write, as YAML.", short="-o", place=Place.REQUIRED)] = (
        None
    )
    formats: Annotated[
        str, Option(help="Candidates WEIGHTS[/ACTIVATIONS][@METHOD] with commas; none leaves alone.", short="-f")
    ] = DEFAULT_CANDIDATES
    text: MeasuringText = field(default_factory=MeasuringText)
    sensitivity: Annotated[str, Option(help="fisher (default, one backward pass), kl (slow, exact) or error.")] = (
        "fisher"
    )
    method: Annotated[str, Option(help="Method of the recipe, see `microscale methods`.")] = "rtn"
    effort: Annotated[str, Option(help="Of method best: fast, good or max.")] = "fast"
    fuse: Annotated[bool, Option(help="Layers that read one input (qkv, gate/up) get one format.")] = False
    fix: Annotated[Sequence[str], Option(help="ROLE=FORMAT or GLOB=FORMAT, e.g. mlp.down=mxfp8; later ones win.")] = ()
    include: Annotated[Sequence[str], Option(help="Also allocate these (roles or globs): lm_head, embedding.")] = ()
    exclude: Annotated[Sequence[str], Option(help="Glob of layers to leave alone.")] = ()
    latency_tokens: Annotated[int, Option(help="Rows of input that a budget in ms is measured with.", minimum=1)] = 1
    points: Annotated[int, Option(help="Budgets on the Pareto front.", minimum=2, maximum=200)] = 25
    plot: Annotated[Path | None, Option(help="Also draw the front: .png, .svg or .pdf.")] = None
    tokenizer: Tokenizer = None
    device: Device = None
    trust_remote_code: TrustRemoteCode = False
