"""What a model is given, as a record.

Text is token ids. What a family takes beside them (pixel values, positions) stands in ``others`` by the name that the
model's ``forward`` has for it; the first axis of each counts the samples, as that of the ids does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from microscale.errors import ShapeError, counted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Samples of one length: ``token_ids`` [samples, tokens], and what the model takes besides.

    Raises:
        ShapeError: another number of samples in ``others``.
    """

    token_ids: Int[Tensor, "samples tokens"]
    others: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        for name, values in self.others.items():
            if len(values) != len(self.token_ids):
                raise ShapeError(f"{name} holds {counted(len(values), 'sample')}, the token ids {len(self.token_ids)}")

    def __len__(self) -> int:
        """How many samples."""
        return len(self.token_ids)

    def __getitem__(self, samples: slice | Tensor) -> Batch:
        """Return some of the samples."""
        return self._with(lambda values: values[samples])

    def split(self, samples: int) -> Iterator[Batch]:
        """Yield the samples in batches of so many; the last may be smaller."""
        for start in range(0, len(self), samples):
            yield self[start : start + samples]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return self._with(lambda values: values.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        others = {name: change(values) for name, values in self.others.items()}
        return Batch(token_ids=change(self.token_ids), others=others)


Runner = Callable[..., Any]
"""Calls a model on a batch that lies on its device: (model, batch, **keywords of its forward) -> what it returns."""


def run_text(model: Any, batch: Batch, **options: Any) -> Any:
    """Call a model that reads token ids, and whatever the batch holds besides."""
    return model(input_ids=batch.token_ids, **batch.others, **options)


def run_both_sides(model: Any, batch: Batch, **options: Any) -> Any:
    """Call a model with an encoder and a decoder: both read the text, unless the batch brings what one of them does."""
    others = {"decoder_input_ids": batch.token_ids, **batch.others}
    if "input_features" in others:  # the encoder hears
        return model(**others, **options)
    return model(input_ids=batch.token_ids, **others, **options)
