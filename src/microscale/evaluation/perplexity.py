"""Perplexity of a callable language model by the reference protocol.

A text is tokenized whole. Each window is BOS and the next ``window - 1`` text tokens (without a BOS in the
vocabulary: ``window`` text tokens, the first of which is not predicted); every text token is predicted once. The
loss is averaged over all predictions; perplexity = exp(mean loss). A shorter last window counts too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from microscale.errors import TextError, counted
from microscale.families.batch import Batch

LanguageModel = Callable[[Batch], Float[Tensor, "batch tokens vocabulary"]]

DEFAULT_WINDOW = 1024
DEFAULT_BATCH = 4
"""Windows in one forward call; formats with a scale per activation tensor see the maximum over all of them."""

_LOSS_ROWS = 1024


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
            logits = model(group)
            targets = group.token_ids[:, 1:]
            total_loss += summed_loss(logits[:, :-1], targets)
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


def summed_loss(logits: Float[Tensor, "batch tokens vocabulary"], targets: Int[Tensor, "batch tokens"]) -> float:
    """Return the summed cross entropy of predictions in nats: float32 terms, summed in float64."""
    rows = logits.reshape(-1, logits.shape[-1])
    labels = targets.reshape(-1).to(rows.device)
    total = 0.0
    for start in range(0, rows.shape[0], _LOSS_ROWS):
        piece = rows[start : start + _LOSS_ROWS].to(torch.float32)
        loss = functional.cross_entropy(piece, labels[start : start + _LOSS_ROWS], reduction="none")
        total += float(loss.to(torch.float64).sum())
    return total
