"""A loaded model as lm-eval takes it: its HFLM with three things settled.

- Every sequence begins with BOS where the tokenizer has one, also where the tokenizer does not add it by itself. Models
  are trained so, and their massive activations sit on that token; without it small models fall to chance.
- Scores need logits at the continuation alone, so the head runs there alone, and the log-softmax too.
- Progress goes to our display.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from lm_eval.models import huggingface
from torch import Tensor
from torch.nn import functional

from microscale.families.batch import Batch
from microscale.families.running import predict

_HFLM: Any = huggingface.HFLM
"""lm-eval's class; its decorator hides the type from checkers."""

TokenRequest = tuple[Any, list[int], list[int]]
"""What lm-eval asks: (texts, tokens of the context, tokens of the continuation)."""


class EvaluatedModel(_HFLM):
    """Our model for lm-eval; ``progress`` gets (requests done, requests in all)."""

    def __init__(
        self, model: Any, tokenizer: Any, *, batch: int, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        self._progress = progress
        self._is_rolling = False
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text, with BOS in front unless the caller wants no special tokens."""
        tokens = cast("list[int]", super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs))
        bos = self.tokenizer.bos_token_id
        wants_bos = bos is not None and add_special_tokens is not False and not self._is_rolling
        return [cast(int, bos), *tokens] if wants_bos and tokens[:1] != [bos] else tokens

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Encode prompts for generation, with BOS in front."""
        bos = self.tokenizer.bos_token
        if bos:
            strings = [string if string.startswith(bos) else bos + string for string in strings]
        return cast("tuple[Tensor, Tensor]", super().tok_batch_encode(strings, *args, **kwargs))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts in windows of the model's length; lm-eval puts the BOS of the first window there itself."""
        self._is_rolling = True
        try:
            return cast("list[float]", super().loglikelihood_rolling(requests, disable_tqdm=True))
        finally:
            self._is_rolling = False

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy) of each continuation; the longest sequences come first.

        Continuations of one token whose contexts are the same share one row. A sequence longer than the model loses its
        beginning, as in lm-eval.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, continuation) in enumerate(requests):
            tokens = (*context, *continuation)[-(self.max_length + 1) :][:-1]
            rows.setdefault(tokens, []).append(place)
        order = sorted(rows, key=lambda tokens: (-len(tokens), tokens))
        step = override_bs or int(self.batch_size)
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        done = 0
        for start in range(0, len(order), step):
            chunk = order[start : start + step]
            for tokens, logits in zip(chunk, self._ends(chunk, requests, rows), strict=True):
                for place in rows[tokens]:
                    answers[place] = _score(logits, requests[place][2])
                done += len(rows[tokens])
            if not self._is_rolling:
                self._progress(done, len(requests))
        return answers

    def _ends(
        self, chunk: Sequence[tuple[int, ...]], requests: list[TokenRequest], rows: dict[tuple[int, ...], list[int]]
    ) -> list[Tensor]:
        """Return for each row of tokens the log-probabilities of its last predictions, as many as are asked for."""
        wanted = [max(len(requests[place][2]) for place in rows[tokens]) for tokens in chunk]
        length = len(chunk[0])
        first = min(len(tokens) - count for tokens, count in zip(chunk, wanted, strict=True))
        padded = torch.zeros(len(chunk), length, dtype=torch.int64)
        for row, tokens in enumerate(chunk):
            padded[row, : len(tokens)] = torch.tensor(tokens)
        with torch.inference_mode():
            batch = Batch(token_ids=padded.to(self.device))
            if self._keeps_logits:
                logits = predict(self.model, batch, logits_to_keep=length - first)
            else:
                logits = predict(self.model, batch)[:, first:]
        ends: list[Tensor] = []
        for row, (tokens, count) in enumerate(zip(chunk, wanted, strict=True)):
            end = len(tokens) - first
            ends.append(functional.log_softmax(logits[row, end - count : end].to(torch.float32), dim=-1).cpu())
        return ends

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        found = super()._model_generate(context, max_length, stop, **generation_kwargs)
        self._generated = getattr(self, "_generated", 0) + context.shape[0]
        self._progress(min(self._generated, self._to_generate), self._to_generate)
        return cast(Tensor, found)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate the answers to prompts, greedily or as the task says."""
        self._generated, self._to_generate = 0, len(requests)
        return cast("list[str]", super().generate_until(requests, disable_tqdm=True))


def _score(ends: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Return the log-likelihood of a continuation from the last predictions of its row, and whether it is greedy."""
    last = ends[len(ends) - len(continuation) :]
    targets = torch.tensor(continuation)
    chosen = last.gather(1, targets[:, None]).to(torch.float64).sum()
    return float(chosen), bool((last.argmax(-1) == targets).all())
