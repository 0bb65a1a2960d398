"""Calibration windows: pieces of a packed token stream, all of one length, chosen by a seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from microscale.errors import TextError, counted

DEFAULT_SAMPLES = 128
DEFAULT_WINDOW = 2048


def calibration_windows(
    tokens: Sequence[int] | Int[Tensor, "tokens"],
    *,
    samples: int = DEFAULT_SAMPLES,
    window: int = DEFAULT_WINDOW,
    bos: int | None,
    seed: int = 0,
) -> Int[Tensor, "samples window"]:
    """Cut text tokens into consecutive windows and return ``samples`` of them.

    Each window is BOS and ``window - 1`` text tokens (without a BOS in the vocabulary: ``window`` text tokens). A rest
    that fills no window is left out. If there are more windows than asked for, the first of a random permutation are
    taken, so that a smaller number of samples is a part of a larger one with the same seed; if there are exactly as
    many, all come in the order of the text.

    Raises:
        TextError: too few tokens, or sizes that make no sense.
    """
    if samples < 1:
        raise TextError(f"the number of calibration samples must be positive, got {samples}")
    minimum = 1 if bos is None else 2
    if window < minimum:
        raise TextError(f"a calibration window needs at least {counted(minimum, 'token')}, got {window}")
    stream = torch.as_tensor(tokens, dtype=torch.int64).flatten()
    step = window if bos is None else window - 1
    available = stream.numel() // step
    if available < samples:
        raise TextError(
            f"the calibration text has {counted(stream.numel(), 'token')}; {counted(samples, 'window')} of {window}"
            f" ({counted(step, 'text token')} each) {'takes' if samples == 1 else 'take'} {samples * step}."
            " Give a longer text, or take"
            + (f" at most {counted(available, 'sample')}" if available else " shorter windows")
        )
    pieces = stream[: available * step].reshape(available, step)
    if available > samples:
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
        pieces = pieces[order[:samples]]
    if bos is None:
        return pieces.clone()
    return torch.cat([torch.full((samples, 1), bos, dtype=torch.int64), pieces], dim=1)
