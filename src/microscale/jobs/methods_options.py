"""The options of ``methods``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from microscale.jobs.option import Option, Options, Place


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodsOptions(Options):
    """Which method is shown; all of them where none is named."""

    name: Annotated[str | None, Option(help="A method or a chain, to see it in full.", place=Place.ARGUMENT)] = None
