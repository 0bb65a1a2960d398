"""How fast a model runs: prompts and single tokens timed on anything that takes tokens; pure measurement.

Nothing here chooses a runtime or reads a file. Every repeat begins a new sequence: the whole prompt, then one token
after the other. One repeat before the first is not counted.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

WARM_UP_TOKENS = 8


class TokenTaker(Protocol):
    """What is measured: something that appends tokens to a sequence."""

    def reset(self) -> None:
        """Begin a new sequence."""

    def prefill(self, tokens: list[int], /) -> object:
        """Append the tokens of a prompt."""

    def step(self, token: int, /) -> object:
        """Append one token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens per second of every repeat."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def lowest(self) -> float:
        """The slowest repeat."""
        return min(self.values)

    @property
    def highest(self) -> float:
        """The fastest repeat."""
        return max(self.values)

    def as_json(self) -> dict[str, Any]:
        """Return the middle, both ends and all values."""
        found = {"median": self.median, "min": self.lowest, "max": self.highest, "values": list(self.values)}
        return {"tokens_per_second": found}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Speeds of prompts (prefill) and of single tokens (decode)."""

    prompt_tokens: int
    new_tokens: int
    prefill: Speed
    decode: Speed

    def bytes_per_second(self, bytes_per_token: int) -> float:
        """Bytes of weights read per second while decoding, given those that each token reads."""
        return bytes_per_token * self.decode.median


def measure_speed(
    model: TokenTaker,
    *,
    vocabulary: int,
    prompt_tokens: int,
    new_tokens: int,
    repeat: int,
    seed: int,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> Speeds:
    """Time a model on random tokens of its vocabulary; all counts are at least 1."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(0, vocabulary, (prompt_tokens + new_tokens,), generator=generator).tolist()
    prompt, new = tokens[:prompt_tokens], tokens[prompt_tokens:]
    prefill: list[float] = []
    decode: list[float] = []
    for done in range(-1, repeat):
        progress(max(done, 0), repeat, "warming up" if done < 0 else "")
        counted = new if done >= 0 else new[:WARM_UP_TOKENS]
        model.reset()
        started = time.perf_counter()
        model.prefill(prompt)
        middle = time.perf_counter()
        for token in counted:
            model.step(token)
        ended = time.perf_counter()
        if done >= 0:
            prefill.append(prompt_tokens / (middle - started))
            decode.append(new_tokens / (ended - middle))
    progress(repeat, repeat, "")
    return Speeds(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill=Speed(values=tuple(prefill)),
        decode=Speed(values=tuple(decode)),
    )


def resident_bytes() -> int:
    """Return the physical memory that this process occupies now (its peak where the system tells no more)."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
