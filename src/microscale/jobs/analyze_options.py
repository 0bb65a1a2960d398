"""The options of ``analyze``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from microscale.jobs.option import Option, Options, Place
from microscale.jobs.shared_options import TextOptions

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
