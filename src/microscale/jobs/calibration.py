"""From a calibration text to windows of token ids of a model, and from windows to its static activation ranges."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from microscale.calibration.chats import Chat, chat_in
from microscale.calibration.windows import calibration_windows
from microscale.errors import CalibrationError, ModelError, TextError, counted, nearest
from microscale.families.batch import Batch
from microscale.families.running import run_model
from microscale.integrations.calibration_text import read_calibration
from microscale.integrations.chat import chat_text
from microscale.integrations.loading import check_window
from microscale.integrations.tokenizing import token_ids
from microscale.jobs.shared_options import Source, TextOptions
from microscale.nn.experts import ExpertTokens, computing
from microscale.nn.inference import cached_weights
from microscale.recipes.calibration import Calibration, Feed
from microscale.recipes.ranges import RangeReport, calibrate_ranges
from microscale.recipes.token_counts import FEWEST_TOKENS

BATCH = 4
"""Windows that run through a model at once."""


def checked_source(source: object) -> Source | None:
    """Return what was given to calibrate on in one of its forms; an array of token ids becomes a tensor.

    Raises:
        CalibrationError: something else.
    """
    if source is None or isinstance(source, str | Path | Tensor):
        return source
    if isinstance(source, np.ndarray) and source.dtype.kind in "iu":
        return torch.from_numpy(source.astype(np.int64))
    items = cast("Sequence[object]", source) if isinstance(source, list | tuple) else ()
    is_one_chat = bool(items) and all(isinstance(item, dict) and "role" in item for item in items)
    items = [list(items)] if is_one_chat else items
    items = [chat_in(item, f"calibration text {number}") or item for number, item in enumerate(items, start=1)]
    texts = [item for item in items if isinstance(item, str | Chat)]
    if texts and len(texts) == len(items):
        return texts
    kinds = dict.fromkeys(type(item).__name__ for item in items)
    got = type(source).__name__ + (f" of {', '.join(kinds)}" if kinds else f" {source!r}"[:80])
    raise CalibrationError(
        "calibration is a text file, JSON lines or the name of a dataset (str or Path), a list of texts or of chats"
        f" (lists of messages), or token ids [samples, tokens] as an integer tensor or array; got {got}"
    )


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse calibration text without a tokenizer.

    Raises:
        ModelError: there is none.
    """
    if tokenizer is None:
        raise ModelError(
            "calibration text needs a tokenizer, and none can be loaded beside the model; put tokenizer.json and"
            " tokenizer_config.json there, or in Python give tokenizer=... or token ids [samples, tokens]"
        )


def parse_feed(feed: str) -> Feed:
    """Return what the word of an option means.

    Raises:
        CalibrationError: another word.
    """
    possible = {each.value: each for each in Feed}
    if feed not in possible:
        raise CalibrationError(f"unknown feed {feed!r}{nearest(feed, possible) or ';'} possible: {', '.join(possible)}")
    return possible[feed]


def parse_experts(word: str) -> ExpertTokens:
    """Return what the word of an option means.

    Raises:
        CalibrationError: another word.
    """
    possible = {each.value: each for each in ExpertTokens}
    if word not in possible:
        hint = nearest(word, possible) or ";"
        raise CalibrationError(f"unknown tokens for experts {word!r}{hint} possible: {', '.join(possible)}")
    return possible[word]


def read_windows(
    text: TextOptions, tokenizer: Any, model: Any, *, feed: str = "original", experts: str = "routed"
) -> Calibration:
    """Tokenize a text, or several, as one stream and cut it into windows; windows of token ids are taken as they are.

    ``feed`` is the word of a :class:`Feed`; without a source there is nothing to read.

    Texts are read only as far as the windows need, and each is followed by the tokenizer's end-of-text token where it
    has one and the source holds more than one text. Chats are written by the tokenizer's template, which ends them.

    Raises:
        TextError: too short, empty or not readable, or token ids that the model does not have.
        ModelError: no tokenizer.
        ShapeError: windows that are longer than the model can read.
        CalibrationError: an unknown word for ``feed``.
    """
    fed, tokens = parse_feed(feed), parse_experts(experts)
    source, samples, window, seed = text.source, text.samples, text.window, text.seed
    if source is None:
        raise CalibrationError("nothing to read: give --calibration FILE (calibration=… in Python)")
    if isinstance(source, Tensor):
        check_window(model, int(source.shape[-1]) if source.ndim == 2 else 0)
        return Calibration(windows=_checked(source, model), seed=seed, batch=BATCH, feed=fed, experts=tokens)
    check_window(model, window)
    check_tokenizer(tokenizer)
    ids: list[Tensor] = []
    wanted = 4 * samples * window  # a choice among four times as many windows spreads them over the text
    length = 0
    for index, piece in enumerate(read_calibration(source, field=text.field)):
        if index and tokenizer.eos_token_id is not None and isinstance(piece, str):
            ids.append(torch.tensor([int(tokenizer.eos_token_id)], dtype=torch.int32))
        ids.append(_ids_of(tokenizer, piece))
        length += len(ids[-1])
        if index and length >= wanted:
            break
    stream = torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int32)
    windows = calibration_windows(stream, samples=samples, window=window, bos=tokenizer.bos_token_id, seed=seed)
    return Calibration(windows=windows, seed=seed, batch=BATCH, feed=fed, experts=tokens)


def _ids_of(tokenizer: Any, piece: str | Chat) -> Tensor:
    """Return the tokens of a text, or of a chat as its template writes it; BOS stands before windows, not in them."""
    if isinstance(piece, str):
        return token_ids(tokenizer, piece)
    ids = token_ids(tokenizer, chat_text(tokenizer, piece.messages))
    return ids[1:] if tokenizer.bos_token_id is not None and ids[:1].tolist() == [tokenizer.bos_token_id] else ids


def measure_ranges(
    model: Any, calibration: Calibration, observer: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> RangeReport:
    """Fill the static activation ranges of a quantized model by running the windows through it.

    Raises:
        CalibrationError, NonFiniteError: see :func:`microscale.recipes.ranges.calibrate_ranges`.
    """
    takes_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    options: dict[str, int] = {"logits_to_keep": 1} if takes_logits else {}

    def forward(tokens: Tensor) -> object:
        return run_model(model, Batch(token_ids=tokens.to(model.device)), **options)

    with cached_weights(model), computing(calibration.experts):
        return calibrate_ranges(
            model,
            calibration.windows,
            observer,
            forward=forward,
            batch=calibration.batch,
            seed=calibration.seed,
            progress=progress,
        )


def range_notes(report: RangeReport) -> list[str]:
    """Say which layers still have no static range, for no calibration token came by, and which have one of few."""
    told: list[str] = []
    if report.few:
        name, count = min(report.few.items(), key=lambda entry: entry[1])
        told.append(
            f"the static ranges of {counted(len(report.few), 'layer')} rest on fewer than {FEWEST_TOKENS} tokens, e.g."
            f" {name} ({count}): give more text, or leave their activations dynamic"
        )
    if report.unseen:
        told.append(
            f"no calibration token reached {counted(len(report.unseen), 'layer')}, which thus have no static range,"
            f" e.g. {report.unseen[0]}; they will refuse to run: give more text, send all tokens through all experts"
            " (--calibrate-experts all), or leave their activations dynamic"
        )
    return told


def _checked(windows: Tensor, model: Any) -> Tensor:
    if windows.ndim != 2 or windows.dtype not in (torch.int32, torch.int64) or windows.numel() == 0:
        raise TextError(f"calibration windows are int64 [samples, tokens], got {windows.dtype} {list(windows.shape)}")
    words = int(model.get_input_embeddings().weight.shape[0])
    if int(windows.min()) < 0 or int(windows.max()) >= words:
        raise TextError(f"calibration windows hold ids from {int(windows.min())} to {int(windows.max())} of {words}")
    return windows.to(torch.int64)
