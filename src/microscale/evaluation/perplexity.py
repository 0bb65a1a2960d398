"""Perplexity of a callable language model by the reference protocol.

A text is tokenized whole. Each window is BOS and the next ``window - 1`` text tokens (without a BOS in the
vocabulary: ``window`` text tokens, the first of which is not predicted); every text token is predicted once. The
loss is averaged over all predictions; perplexity = exp(mean loss). A shorter last window counts too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from microscale.errors import TextError, counted
from microscale.families.batch import Batch
from microscale.families.predictions import Predictions, whole_predictions

LanguageModel = Callable[[Batch], Float[Tensor, "batch tokens vocabulary"]]
"""Gives logits. One with a method ``predictions`` is asked for a few rows at a time instead: :func:`predictions_of`."""

DEFAULT_WINDOW = 1024
DEFAULT_BATCH = 4
"""Windows in one forward call; formats with a scale per activation tensor see the maximum over all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityResult:
    """exp(mean loss), over how many predictions, in how many seconds."""

    perplexity: float
    tokens: int
    seconds: float
    windows: int


def make_windows(
    tokens: Sequence[int], *, window: int = DEFAULT_WINDOW, num_tokens: int | None = None, bos: int | None
) -> list[Int[Tensor, "tokens"]]:
    """Cut text tokens into windows.

    Raises:
        TextError: fewer tokens than asked for, none to predict, or a window shorter than two.
    """
    if window < 2:
        raise TextError(f"a window needs at least 2 tokens, got {window}")
    if num_tokens is not None and num_tokens < 1:
        raise TextError(f"the number of tokens must be positive, got {num_tokens}")
    if num_tokens is not None and num_tokens > len(tokens):
        raise TextError(
            f"the text has {counted(len(tokens), 'token')}, fewer than the {num_tokens} asked for; lower --tokens"
        )
    used = torch.tensor(tokens[:num_tokens], dtype=torch.int64)
    minimum = 1 if bos is not None else 2
    if used.numel() < minimum:
        raise TextError(f"the text has {counted(used.numel(), 'token')}: nothing to predict; give a longer text")
    step = window - 1 if bos is not None else window
    windows: list[Tensor] = []
    for start in range(0, used.numel(), step):
        piece = used[start : start + step]
        if bos is not None:
            piece = torch.cat([torch.tensor([bos]), piece])
        if piece.numel() >= 2:
            windows.append(piece)
    return windows


def perplexity(
    model: LanguageModel,
    windows: Sequence[Int[Tensor, "tokens"]],
    *,
    batch: int = DEFAULT_BATCH,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PerplexityResult:
    """Score a model on windows, ``batch`` of equal length in one call.

    Special values: a non-finite loss gives a non-finite perplexity (a broken model), never an error.

    Raises:
        TextError: no windows.
    """
    if not windows:
        raise TextError("there is no window to score; cut a text with make_windows")
    started = time.perf_counter()
    total_loss, total_tokens, done = 0.0, 0, 0
    for group in batches(windows, batch):
        with torch.inference_mode():
            targets = group.token_ids[:, 1:].reshape(-1)
            found = predictions_of(model, group)
            for rows in row_ranges(found):
                total_loss += summed_loss(found.rows_at(rows.start, rows.stop), targets[rows])
        total_tokens += targets.numel()
        done += len(group)
        progress(done, len(windows))
    return PerplexityResult(
        perplexity=perplexity_of_mean(total_loss / total_tokens),
        tokens=total_tokens,
        seconds=time.perf_counter() - started,
        windows=len(windows),
    )


def perplexity_of_mean(loss: float) -> float:
    """Return exp(mean loss); Inf where that overflows, NaN for NaN."""
    return math.inf if loss >= 700 else math.exp(loss)


def batches(windows: Sequence[Tensor], batch: int) -> list[Batch]:
    """Stack neighbouring windows of equal length, at most ``batch`` of them."""
    groups: list[list[Tensor]] = []
    for window in windows:
        if groups and len(groups[-1]) < batch and groups[-1][0].numel() == window.numel():
            groups[-1].append(window)
        else:
            groups.append([window])
    return [Batch(token_ids=torch.stack(group)) for group in groups]


def predictions_of(model: LanguageModel, batch: Batch) -> Predictions:
    """Return the predictions of a batch: from the model's method ``predictions`` where it has one, else all at once."""
    in_pieces: Any = getattr(model, "predictions", None)
    return whole_predictions(model(batch)) if in_pieces is None else in_pieces(batch)


def row_ranges(*sides: Predictions) -> Iterator[slice]:
    """Yield the rows that are to be asked for together, from each of the sides."""
    step = min(side.step for side in sides)
    for start in range(0, sides[0].num_rows, step):
        yield slice(start, min(start + step, sides[0].num_rows))


def summed_loss(logits: Float[Tensor, "rows vocabulary"], targets: Int[Tensor, "rows"]) -> float:
    """Return the summed cross entropy of predictions in nats: float32 terms, summed in float64."""
    loss = functional.cross_entropy(logits.to(torch.float32), targets.to(logits.device), reduction="none")
    return float(loss.to(torch.float64).sum())
