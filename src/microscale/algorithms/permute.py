"""Channel permutation that deals the channels of the largest inputs one to a block.

MX+ keeps one outlier of a block precisely; two in one block cost it. Channels are ranked by their largest input and
dealt like cards, so that each block gets one of the first, one of the second rank, and so on.

Source: arXiv 2510.14557, section on channel reordering (table 12).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from microscale.algorithms.contract import GroupProblem, TransformStep
from microscale.algorithms.rtn import block_width
from microscale.calibration.statistics import Wanted
from microscale.formats import ActivationSpec, BlockFormat, Format, SegmentedFormat, VectorBlock
from microscale.transforms import Transform, permute_transform


@dataclass(frozen=True, slots=True, kw_only=True)
class Permute(TransformStep):
    """x' = x in an order in which every block holds its share of the outlier channels."""

    name: ClassVar[str] = "permute"
    source: ClassVar[str] = "arXiv 2510.14557 table 12"

    @property
    def wanted(self) -> Wanted | None:
        """Channel maxima."""
        return Wanted.RANGE

    def idleness(self, fmt: Format, activations: ActivationSpec | None) -> str | None:
        """Say where no order of the channels is better than another."""
        is_dealt = isinstance(fmt, SegmentedFormat) or (
            isinstance(fmt, BlockFormat) and isinstance(fmt.block, VectorBlock)
        )
        return None if is_dealt else "channels are dealt to the blocks of a row, and it has none"

    def transforms(self, group: GroupProblem) -> tuple[Transform, ...]:
        """Return the permutation; nothing for a width of less than two blocks."""
        assert group.inputs is not None
        width = block_width(group.layers[0].format, group.cols)
        if width is None or group.cols % width or group.cols < 2 * width:
            return ()
        ranked = torch.argsort(group.inputs.amax, descending=True, stable=True)
        return (permute_transform(ranked.reshape(width, -1).T.reshape(-1)),)
