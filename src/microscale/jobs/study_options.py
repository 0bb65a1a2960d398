"""The options of ``study``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from microscale.jobs.option import Option, Options, Place


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions(Options):
    """Which study is run, how far, and where its results go."""

    file: Annotated[Path, Option(help="The study as YAML; docs/evaluation.md has an example.", place=Place.ARGUMENT)]
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
    device: Annotated[str, Option(help="Where models run: cpu, cuda.")] = "cpu"
