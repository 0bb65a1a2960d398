"""How many tokens of calibration each group of layers saw, and which saw too few to learn from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from microscale.calibration.statistics import InputStatistics
from microscale.errors import counted
from microscale.nn.experts import Experts

FEWEST_TOKENS = 16
"""What is measured on fewer tokens than this is thrown away: it says more about those tokens than about the text."""
_NUMBERED = re.compile(r"(.*\.\d+)\.")
EXPERT_ROLE = "moe.experts"


class TokenCounts:
    """Counts tokens while layers are measured, and lets statistics of too few of them go."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._experts: dict[str, int] = {}
        self._few: dict[str, int] = {}
        self._scarce: dict[str, str] = {}

    @property
    def of_experts(self) -> Mapping[str, int]:
        """How many tokens each expert was measured on, by its name; 0 where none reached it."""
        return MappingProxyType(self._experts)

    def enough(self, name: str, role: str, inputs: InputStatistics) -> InputStatistics | None:
        """Count what the group of a layer saw; returns its statistics, or None where they are of too few tokens."""
        count, width = inputs.num_tokens, inputs.cols
        expert = self._expert_of(name, role)
        if expert is not None:
            self._experts[expert] = max(count, self._experts.get(expert, 0))
        if count < FEWEST_TOKENS:
            self._few[name] = count
            return None
        if count < width:
            self._scarce[name] = f"{counted(count, 'token')} for {width} inputs"
        return inputs

    def _expert_of(self, name: str, role: str) -> str | None:
        """Return the expert that a layer belongs to: what is numbered last in its name."""
        numbered = _NUMBERED.match(f"{name}.")
        if numbered is None:
            return None
        parent = numbered[1].rpartition(".")[0]
        is_expert = role.startswith(EXPERT_ROLE) or isinstance(self._model.get_submodule(parent), Experts)
        return numbered[1] if is_expert else None

    @property
    def notes(self) -> list[str]:
        """What a user should know: how unevenly experts are reached, and what was rounded without statistics."""
        told: list[str] = []
        if self._experts:
            fewest = sorted(self._experts.items(), key=lambda entry: entry[1])[:3]
            told.append(
                f"{counted(len(self._experts), 'expert')} saw between {fewest[0][1]:,} and"
                f" {max(self._experts.values()):,} tokens of calibration; the fewest:"
                f" {', '.join(f'{name} ({count:,})' for name, count in fewest)}. With --calibrate-experts all every"
                " token goes through every expert while it is measured"
            )
        if self._few:
            named = [f"{name} ({count})" for name, count in self._few.items()]
            more = f" and {len(named) - 8} more" if len(named) > 8 else ""
            told.append(
                f"rounded to nearest, for fewer than {FEWEST_TOKENS} tokens of calibration reached them:"
                f" {', '.join(named[:8])}{more}"
            )
        if self._scarce:
            name, count = next(iter(self._scarce.items()))
            told.append(
                f"{counted(len(self._scarce), 'group')} of layers saw fewer tokens than they have inputs, e.g. {name}"
                f" {count}: what is learned holds for what was seen alone; give more calibration text"
            )
        return told
