"""How far a model has moved from a reference: KL divergence and top-1 agreement of their predictions.

Perplexity can hide changes that cancel out; these two cannot. Both models predict the same tokens of the same windows
(see :mod:`microscale.evaluation.perplexity`). With p the reference's distribution of the next token and q the model's,

    KL = Σ p · (log p − log q)   in nats, one number for each prediction,
    agreement = share of the predictions whose most likely token is the same.

Only one number for each prediction is kept, so the percentile is exact and the text may be long.

Source: the measure of llama.cpp's ``perplexity --kl-divergence``; Dutta et al., "Accuracy is Not All You Need",
arXiv:2407.09141.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from microscale.errors import ShapeError, TextError
from microscale.evaluation.perplexity import (
    DEFAULT_BATCH,
    LanguageModel,
    batches,
    perplexity_of_mean,
    predictions_of,
    row_ranges,
    summed_loss,
)

_PIECE_VALUES = 2**22
"""Logits that are turned to float64 at once: 32 MB for each of the two models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityResult:
    """Perplexity of both, KL divergence in nats (mean, 99th percentile, maximum), share of equal top-1 predictions."""

    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    agreement: float
    tokens: int
    windows: int
    seconds: float


def fidelity(
    model: LanguageModel,
    reference: LanguageModel,
    windows: Sequence[Int[Tensor, "tokens"]],
    *,
    batch: int = DEFAULT_BATCH,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FidelityResult:
    """Score a model and a reference on the same windows, ``batch`` of equal length in one call of each.

    Special values: non-finite logits give a non-finite KL and perplexity, never an error; see :func:`divergence`.

    Raises:
        TextError: no windows.
        ShapeError: the models' vocabularies differ in size.
    """
    if not windows:
        raise TextError("there is no window to score; cut a text with make_windows")
    started = time.perf_counter()
    loss, reference_loss, done = 0.0, 0.0, 0
    divergences: list[Tensor] = []
    num_equal, num_tokens = 0, 0
    for group in batches(windows, batch):
        with torch.inference_mode():
            targets = group.token_ids[:, 1:].reshape(-1)
            sides = predictions_of(reference, group), predictions_of(model, group)
            for rows in row_ranges(*sides):
                expected, found = (side.rows_at(rows.start, rows.stop) for side in sides)
                loss += summed_loss(found, targets[rows])
                reference_loss += summed_loss(expected, targets[rows])
                divergences.append(divergence(expected, found).to("cpu"))
                num_equal += int((expected.argmax(-1) == found.to(expected.device).argmax(-1)).sum())
        num_tokens += targets.numel()
        done += len(group)
        progress(done, len(windows))
    values = torch.cat(divergences).numpy()
    return FidelityResult(
        perplexity=perplexity_of_mean(loss / num_tokens),
        reference_perplexity=perplexity_of_mean(reference_loss / num_tokens),
        kl_mean=float(values.mean()),
        kl_p99=_quantile(values, 0.99),
        kl_max=float(values.max()),
        agreement=num_equal / num_tokens,
        tokens=num_tokens,
        windows=len(windows),
        seconds=time.perf_counter() - started,
    )


def divergence(
    reference: Float[Tensor, "*rows vocabulary"], model: Float[Tensor, "*rows vocabulary"]
) -> Float[Tensor, "*rows"]:
    """Return KL(softmax(reference) ‖ softmax(model)) of each row in nats, float64.

    Special values: a token that the reference excludes (logit −Inf) adds nothing; one that only the model excludes
    makes the row +Inf. NaN or +Inf in a row of either gives NaN. Rounding never leaves a row below 0.

    Raises:
        ShapeError: the shapes differ.
    """
    if reference.shape != model.shape:
        raise ShapeError(
            f"the reference predicts {tuple(reference.shape)} logits, the model {tuple(model.shape)};"
            " both must have one vocabulary"
        )
    size = reference.shape[-1]
    rows, others = reference.reshape(-1, size), model.reshape(-1, size)
    step = max(1, _PIECE_VALUES // max(1, size))
    pieces = [_divergence_of_rows(rows[at : at + step], others[at : at + step]) for at in range(0, len(rows), step)]
    empty = torch.zeros(0, dtype=torch.float64, device=reference.device)
    return torch.cat([empty, *pieces]).reshape(reference.shape[:-1])


def _divergence_of_rows(
    reference: Float[Tensor, "rows vocabulary"], model: Float[Tensor, "rows vocabulary"]
) -> Float[Tensor, "rows"]:
    log_p = torch.log_softmax(reference.to(torch.float64), dim=-1)
    log_q = torch.log_softmax(model.to(reference.device, torch.float64), dim=-1)
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill_(torch.isneginf(log_p), 0.0).sum(-1).clamp_(min=0.0)


def _quantile(values: np.ndarray, share: float) -> float:
    """Return the smallest value that at least ``share`` of all do not exceed; NaN if one is NaN."""
    return float(np.quantile(values, share, method="inverted_cdf"))
