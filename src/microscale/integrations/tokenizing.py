"""Texts to token ids and to windows; a long text goes piece by piece: at once, 3 MB take a tokenizer 460 MB of memory.

The pieces overlap. Two neighbours are joined in the middle of what they share, where both have the same tokens at the
same places, ``AGREEING`` in a row: away from the ends of a piece, a tokenizer gives what it gives for the whole text.
If there is no such place, the text is tokenized as a whole.
"""

from __future__ import annotations

import bisect
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from microscale.evaluation.perplexity import make_windows

PIECE_CHARS = 1 << 15
OVERLAP_CHARS = 1 << 11
AGREEING = 16


def token_ids(tokenizer: Any, text: str) -> Int[Tensor, "tokens"]:
    """Return the ids of a text, without special tokens, as one call of the tokenizer would give them."""
    if not getattr(tokenizer, "is_fast", False) or len(text) <= PIECE_CHARS + OVERLAP_CHARS:
        return _ids(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    found: list[Tensor] = []
    ids, starts = _piece(tokenizer, text, 0)
    for start in range(PIECE_CHARS, len(text), PIECE_CHARS):
        next_ids, next_starts = _piece(tokenizer, text, start)
        joint = _joint(ids, starts, next_ids, next_starts, start + OVERLAP_CHARS // 2)
        if joint is None and start + OVERLAP_CHARS >= len(text):
            break  # the last piece lies in what the one before it has
        if joint is None:
            return _ids(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        found.append(_ids(ids[: joint[0]]))
        ids, starts = next_ids[joint[1] :], next_starts[joint[1] :]
    return torch.cat([*found, _ids(ids)])


def _ids(ids: list[int]) -> Int[Tensor, "tokens"]:
    return torch.tensor(ids, dtype=torch.int32)


def _piece(tokenizer: Any, text: str, start: int) -> tuple[list[int], list[int]]:
    """Return the ids of a piece and where each token starts in the text."""
    piece = text[start : start + PIECE_CHARS + OVERLAP_CHARS]
    found = tokenizer(piece, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return list(found["input_ids"]), [start + first for first, _ in found["offset_mapping"]]


def _joint(
    ids: list[int], starts: list[int], next_ids: list[int], next_starts: list[int], middle: int
) -> tuple[int, int] | None:
    """Return the first places behind ``middle``, in two pieces, from where both go on alike."""
    place = bisect.bisect_left(starts, middle)
    while place + AGREEING <= len(ids):
        other = bisect.bisect_left(next_starts, starts[place])
        here, there = slice(place, place + AGREEING), slice(other, other + AGREEING)
        if starts[here] == next_starts[there] and ids[here] == next_ids[there]:
            return place, other
        place = bisect.bisect_right(starts, starts[place])  # bytes of one character start at one place
    return None


def text_windows(tokenizer: Any, text: str, *, window: int, tokens: int | None) -> list[Int[Tensor, "tokens"]]:
    """Tokenize a text without special tokens and cut it into windows that begin with BOS.

    Raises:
        TextError: see :func:`microscale.evaluation.make_windows`.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return make_windows(ids, window=window, num_tokens=tokens, bos=tokenizer.bos_token_id)
