"""The extension module, the instruction-set level in use, and why there is none where there is none.

The extension (``csrc/cpu``) is compiled when the package is installed. Each kernel exists once for every level:
``portable``, ``avx2``, ``avx512`` (with VNNI) and ``avx512_bf16`` (with BF16 and VBMI). The best one that the machine
runs is taken; the environment variable ``MICROSCALE_CPU_LEVEL`` or :func:`use_level` forces another.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from microscale.errors import KernelError

LEVEL_VARIABLE = "MICROSCALE_CPU_LEVEL"


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("microscale.kernels.cpu._native"), None
    except ImportError as error:
        return None, (
            f"the compiled CPU kernels are not installed ({error}), so the slow reference path is in use; to get them,"
            " install a C++20 compiler (on Debian: apt install g++) and install microscale again"
        )


NATIVE, UNAVAILABLE = _load()
"""The extension module or None, and in that case the reason with its remedy."""


def levels() -> dict[str, int]:
    """Return the levels that this build has and this machine runs, slowest first."""
    return {} if NATIVE is None else {name: index for index, name in NATIVE.levels()}


def _first_level() -> int:
    if NATIVE is None:
        return -1
    wanted = os.environ.get(LEVEL_VARIABLE)
    return NATIVE.best_level() if not wanted else _level_index(wanted)


def _level_index(name: str) -> int:
    found = levels()
    if name not in found:
        there = ", ".join(found) or "none"
        raise KernelError(f"the instruction-set level {name!r} is not there; this machine and build have: {there}")
    return found[name]


@dataclass(slots=True)
class _Choice:
    level: int


_choice = _Choice(_first_level())


def level() -> int:
    """Return the index of the level in use, as the extension's functions take it (-1 without the extension)."""
    return _choice.level


def level_name() -> str:
    """Return the name of the level in use, ``none`` without the extension."""
    return next((name for name, index in levels().items() if index == _choice.level), "none")


@contextmanager
def use_level(name: str) -> Generator[None, None, None]:
    """Run the block on another level of this machine (for tests and comparisons).

    Raises:
        KernelError: the machine or the build has no such level.
    """
    before = _choice.level
    _choice.level = _level_index(name)
    try:
        yield
    finally:
        _choice.level = before


def num_threads() -> int:
    """Return how many threads a kernel may use: torch's number."""
    return torch.get_num_threads()
