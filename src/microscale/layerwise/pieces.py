"""A language model's logits, a few rows at a time: of a large vocabulary they would be the largest tensor of a job.

The model runs once up to its last hidden states. Then its own forward is called again for each piece of them, with a
base model that does nothing but give the piece: whatever the model does to logits (softcapping, scaling, a bias) is
done by its own code. Whether that gives the logits of the whole model is seen on a short text, once for each head; a
model for which it does not, or that is not built so, is called as a whole.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from microscale.families.batch import Batch
from microscale.families.predictions import MOST_ROWS, Predictions, whole_predictions
from microscale.families.running import predict, run_model
from microscale.kernels.dispatch import uncounted
from microscale.layerwise.blocks import FoundError, removed_after, replaced_forward
from microscale.nn.linear import QuantizedLinear

PIECE_VALUES = 2**23
"""Logits that are at hand at a time: 32 MB in float32."""
SMALL_VOCABULARY = 2**15
"""Up to so many words :data:`MOST_ROWS` rows are asked for at a time: 128 MB at most."""
PROBE_TOKENS = 8
"""Tokens of the text by which pieces are compared with the whole."""
TOLERANCE = 1e-4
"""By how much logits may differ, as a share of the largest: sums of a matrix product may come in another order."""


class LanguageModelInPieces:
    """A model of transformers as a function of a batch that lies anywhere, and its predictions piece by piece."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._head: Any = None
        self._base: str | None = None

    def __call__(self, batch: Batch) -> Float[Tensor, "samples tokens vocabulary"]:
        """Return all logits."""
        return predict(self._model, batch.to(self._model.device))

    def predictions(self, batch: Batch) -> Predictions:
        """Run the model on a batch; its head runs when rows are asked for."""
        batch = batch.to(self._model.device)
        base = self._judged(batch)
        output = None if base is None else _base_output(self._model, base, batch)
        if base is None or output is None:
            return whole_predictions(predict(self._model, batch))
        model, hidden, ids = self._model, _hidden_of(output), batch.token_ids[:, :-1].reshape(1, -1)
        hidden = hidden[:, :-1].reshape(1, -1, hidden.shape[-1])

        def rows_at(start: int, stop: int) -> Tensor:
            counting = uncounted() if start else contextlib.nullcontext()  # the head counts once for each batch
            with counting:
                return _piece(model, base, output, hidden[:, start:stop], ids[:, start:stop])

        words = int(model.get_output_embeddings().out_features)
        step = MOST_ROWS if words <= SMALL_VOCABULARY else max(1, PIECE_VALUES // words)
        return Predictions(num_rows=ids.shape[1], step=step, rows_at=rows_at)

    def _judged(self, batch: Batch) -> str | None:
        """Return the name of the base model whose hidden states can be given in pieces, or None."""
        head = self._model.get_output_embeddings() if hasattr(self._model, "get_output_embeddings") else None
        if not _is_row_by_row(head) or batch.others:
            return None
        if self._head is not head:
            with uncounted():
                self._head, self._base = head, _judged_base(self._model, batch[:1])
        return self._base


def _is_row_by_row(head: Any) -> bool:
    """Whether a head makes each row of logits of one row: not where it rounds its inputs, by what all of them hold."""
    return isinstance(head, nn.Linear) or (isinstance(head, QuantizedLinear) and head.activations is None)


def _judged_base(model: Any, sample: Batch) -> str | None:
    """Return the name of a model's base if a short text has the same logits in pieces as it has as a whole."""
    base: Any = getattr(model, "base_model", None)
    name = next((name for name, module in model.named_modules() if name and module is base), None)
    if name is None or "forward" in vars(base):
        return None
    probe = Batch(token_ids=sample.token_ids[:, :PROBE_TOKENS])
    output = _base_output(model, name, probe)
    if output is None:
        return None
    hidden, half = _hidden_of(output), probe.token_ids.shape[1] // 2
    if hidden.shape[:2] != probe.token_ids.shape:
        return None
    wanted = predict(model, probe)[0].to(torch.float32)
    places = (slice(None, half), slice(half, None)) if half else (slice(None),)
    pieces = [_piece(model, name, output, hidden[:, place], probe.token_ids[:, place]) for place in places]
    found = torch.cat(pieces).to(torch.float32)
    if found.shape != wanted.shape:
        return None
    bound = TOLERANCE * float(wanted.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return name if torch.allclose(found, wanted, rtol=0.0, atol=bound, equal_nan=True) else None


def _base_output(model: Any, base: str, batch: Batch) -> Any:
    """Return what the base model gives in a forward pass of the whole, which ends there; None: no hidden states."""
    found: list[Any] = []

    def stop(_module: nn.Module, _arguments: Any, output: Any) -> None:
        found.append(output)
        raise FoundError

    handle = model.get_submodule(base).register_forward_hook(stop)
    with removed_after(handle), contextlib.suppress(FoundError):
        run_model(model, batch)
    is_known = len(found) == 1 and isinstance(_hidden_of(found[0]), Tensor) and _hidden_of(found[0]).ndim == 3
    return found[0] if is_known else None


def _hidden_of(output: Any) -> Any:
    """Return the last hidden states in what a base model gives."""
    return output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)


def _piece(
    model: Any, base: str, output: Any, hidden: Float[Tensor, "1 rows width"], ids: Int[Tensor, "1 rows"]
) -> Float[Tensor, "rows vocabulary"]:
    """Return the logits that a model makes of some hidden states."""
    if isinstance(output, tuple):
        given: Any = (hidden, *output[1:])
    else:
        given = copy.copy(output)
        given["last_hidden_state"] = hidden
    with replaced_forward({base: lambda *_, **__: given}, model):
        return predict(model, Batch(token_ids=ids))[0]
