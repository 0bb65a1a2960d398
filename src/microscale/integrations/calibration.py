"""From a calibration text to windows of token ids of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from microscale.calibration import calibration_windows
from microscale.errors import ModelError, TextError
from microscale.integrations.calibration_text import read_calibration
from microscale.integrations.loading import check_window
from microscale.recipes import Calibration


def read_windows(
    source: str | Path | Int[Tensor, "samples tokens"],
    tokenizer: Any,
    model: Any,
    *,
    samples: int,
    window: int,
    seed: int,
    batch: int = 4,
) -> Calibration:
    """Tokenize a text as one stream and cut it into windows; windows of token ids are taken as they are.

    Texts are read only as far as the windows need, and each is followed by the tokenizer's end-of-text token where it
    has one and the source holds more than one text.

    Raises:
        TextError: too short, empty or not readable, or token ids that the model does not have.
        ModelError: no tokenizer, or windows that are longer than the model can read.
    """
    if isinstance(source, Tensor):
        return Calibration(windows=_checked(source, model), seed=seed, batch=batch)
    check_window(model, window)
    if tokenizer is None:
        raise ModelError("calibration text needs a tokenizer, and the model has none; give windows of token ids")
    ids: list[int] = []
    wanted = 4 * samples * window  # a choice among four times as many windows spreads them over the text
    for index, text in enumerate(read_calibration(source)):
        if index and tokenizer.eos_token_id is not None:
            ids.append(int(tokenizer.eos_token_id))
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if index and len(ids) >= wanted:
            break
    windows = calibration_windows(ids, samples=samples, window=window, bos=tokenizer.bos_token_id, seed=seed)
    return Calibration(windows=windows, seed=seed, batch=batch)


def _checked(windows: Tensor, model: Any) -> Tensor:
    if windows.ndim != 2 or windows.dtype not in (torch.int32, torch.int64) or windows.numel() == 0:
        raise TextError(f"calibration windows are int64 [samples, tokens], got {windows.dtype} {list(windows.shape)}")
    words = int(model.get_input_embeddings().weight.shape[0])
    if int(windows.min()) < 0 or int(windows.max()) >= words:
        raise TextError(f"calibration windows hold ids from {int(windows.min())} to {int(windows.max())} of {words}")
    return windows.to(torch.int64)
