"""What stochastic rounding draws its random bits from: a seed, a step and a place, never a hidden state.

Training gives a :class:`Draw` with every tensor that it rounds: each step draws anew, two tensors of a model draw
differently, and a run that is resumed at a step draws the same again. :func:`~microscale.formats.codec.random_bits`
makes the bits of each element from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from microscale.errors import FormatError, check_kind

if TYPE_CHECKING:
    from torch import Tensor

_MASK32 = 0xFFFFFFFF
_SEED_OFFSET = 0x9E3779B9
_STEP_OFFSET = 0x85EBCA6B
_PLACE_OFFSET = 0xC2B2AE35


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One draw: the ``seed`` of a run, its ``step``, and the ``place`` of the tensor (:func:`tensor_place`).

    Raises:
        FormatError: something else than whole numbers from 0 on.
    """

    seed: int = 0
    step: int = 0
    place: int = 0

    def __post_init__(self) -> None:
        for name in ("seed", "step", "place"):
            value: int = getattr(self, name)
            expected = "a whole number from 0 on"
            check_kind(value, int, f"the {name} of a draw", expected, error=FormatError)
            if value < 0:
                raise FormatError(f"the {name} of a draw must be {expected}, got {value}")

    @property
    def key(self) -> int:
        """The 32 bits that the draw contributes to each element's random bits.

        Formula, with mix of :func:`mix`: k = mix(seed + 0x9E3779B9); this is the key where step and place are 0, else
        it is mix(mix(k ^ mix(step + 0x85EBCA6B)) ^ mix(place + 0xC2B2AE35)). Two draws share a key with a chance of
        2^-32.
        """
        seed_key = mix(self.seed + _SEED_OFFSET)
        if self.step == 0 and self.place == 0:
            return seed_key
        return mix(mix(seed_key ^ mix(self.step + _STEP_OFFSET)) ^ mix(self.place + _PLACE_OFFSET))

    def part(self, index: int) -> Draw:
        """Return the draw of a part of a compound format (a stream of a pair, a segment): place + index."""
        return dataclasses.replace(self, place=self.place + index)


def part_draw(draw: Draw | None, index: int) -> Draw | None:
    """Return the draw of a part of a compound format; without one each part has the default draw of its own format."""
    return None if draw is None else draw.part(index)


def tensor_place(name: str) -> int:
    """Return the place of a tensor by its name: the first 8 bytes of SHA-256 of its UTF-8, little-endian, mod 2^62."""
    check_kind(name, str, "the name of a tensor", "a text")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % 2**62


_Word = TypeVar("_Word", int, "Tensor")


def mix(h: _Word) -> _Word:
    """Mix 32 bits: three rounds of h ^= h >> s; h = h * c mod 2^32.

    (s, c) = (16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1). Numbers from 2^32 on are first folded: h ^ (h >> 32) *
    0x85EBCA6B, mod 2^32.

    Source: the integer mixing function with these constants is public (lowest known bias for two rounds).
    """
    h = (h ^ ((h >> 32) * 0x85EBCA6B)) & _MASK32
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) & _MASK32
    h = ((h ^ (h >> 15)) * 0x735A2D97) & _MASK32
    return h ^ (h >> 15)
