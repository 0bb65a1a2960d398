"""What a decoder layer returns: hidden states alone, or first of several things."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

CARRIED = object()
"""Stands for what a layer returns beside hidden states, where it is not None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    """The form of a layer's output: ``kind`` is tensor, tuple or list; ``others`` says what follows the hidden states.

    True where the layer returns something, False where it returns None.
    """

    kind: str = "tensor"
    others: tuple[bool, ...] = ()

    @classmethod
    def of(cls, output: Any) -> Returned:
        """Return the form of an output."""
        if not isinstance(output, tuple | list):
            return cls()
        kind = "tuple" if isinstance(output, tuple) else "list"
        values = cast("tuple[Any, ...]", output)
        return cls(kind=kind, others=tuple(value is not None for value in values[1:]))

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Returned:
        """Return what :meth:`facts` wrote."""
        return cls(kind=str(facts["kind"]), others=tuple(bool(each) for each in facts["others"]))

    @property
    def facts(self) -> dict[str, Any]:
        """What a file keeps of it."""
        return {"kind": self.kind, "others": list(self.others)}

    def giving(self, hidden: Tensor) -> Any:
        """Return hidden states as the layer would, with :data:`CARRIED` for all else."""
        if self.kind == "tensor":
            return hidden
        values = (hidden, *(CARRIED if is_there else None for is_there in self.others))
        return values if self.kind == "tuple" else list(values)

    def stand_in(self, hidden: Tensor) -> Callable[..., Any]:
        """Return a function that gives these hidden states, whatever it gets."""
        return lambda *_arguments, **_keywords: self.giving(hidden)
