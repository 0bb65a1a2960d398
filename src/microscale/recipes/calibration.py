"""Calibration: the windows of text that methods learn from, and how they are fed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from jaxtyping import Int
from torch import Tensor

from microscale.families.batch import Batch
from microscale.nn.experts import ExpertTokens


class Feed(Enum):
    """What a decoder layer is measured on: what the quantized layers before it give, or what the unquantized model
    gives, before any part of it is quantized.
    """

    QUANTIZED = "quantized"
    ORIGINAL = "original"


class ChannelOrder(Enum):
    """Where an order of channels goes: into the layers before where that is exact (FOLDED), or always to run time
    (ONLINE), so that every layer can stand alone among unquantized ones.
    """

    FOLDED = "folded"
    ONLINE = "online"


class CalibrationText(Enum):
    """Whether a job gets text to learn from."""

    GIVEN = "given"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Windows of token ids, and how they are run: ``batch`` at a time; ``experts``: which tokens measure an expert."""

    windows: Int[Tensor, "samples tokens"]
    batch: int = 4
    feed: Feed = Feed.QUANTIZED
    seed: int = 0
    order: ChannelOrder = ChannelOrder.FOLDED
    experts: ExpertTokens = ExpertTokens.ROUTED

    @property
    def samples(self) -> Batch:
        """The windows as what a model is given."""
        return Batch(token_ids=self.windows)
