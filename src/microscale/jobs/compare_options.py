"""The options of ``compare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from microscale.jobs.evaluate_options import TEXT_HELP, Tokens, Window
from microscale.jobs.option import Option, Options, Place
from microscale.jobs.shared_options import OriginalModel, Seed, Tokenizer


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
