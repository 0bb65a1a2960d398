"""Logits in pieces: the same numbers as the whole model's, whatever it does to them, and never all of them at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microscale
from microscale.evaluation.fidelity import fidelity
from microscale.evaluation.perplexity import perplexity
from microscale.families.batch import Batch
from microscale.families.predictions import Predictions
from microscale.kernels import count_executions
from microscale.layerwise import pieces
from microscale.layerwise.pieces import LanguageModelInPieces
from microscale.nn.linear import QuantizedLinear
from tiny_models import tiny_model

IDS = torch.randint(3, 150, (3, 40), generator=torch.Generator().manual_seed(0))
BATCH = Batch(token_ids=IDS)

# Softcapping of logits, their scaling three ways, a bias, a base model with another name, eyes beside the text.
CHANGING = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 7.0},
    "cohere": {"logit_scale": 0.3},
    "phi": {},
    "gpt_neox": {},
    "mamba": {},
    "qwen2_vl": {},
}


def all_rows(found: Predictions) -> Tensor:
    places = range(0, found.num_rows, found.step)
    return torch.cat([found.rows_at(place, min(place + found.step, found.num_rows)) for place in places])


def small_pieces(monkeypatch: pytest.MonkeyPatch, values: int) -> None:
    """Let a piece have so many logits, and take every vocabulary for a large one."""
    monkeypatch.setattr(pieces, "PIECE_VALUES", values)
    monkeypatch.setattr(pieces, "SMALL_VOCABULARY", 0)


def tokens_in_forward(model: Any) -> list[int]:
    """How many rows the head gets in each call, as a list that fills up."""
    seen: list[int] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    return seen


@pytest.mark.parametrize("family", CHANGING)
@torch.inference_mode()
def test_the_logits_are_those_of_the_whole_model(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, **CHANGING[family])
    width = model.get_output_embeddings().in_features
    expected = model(input_ids=IDS).logits[:, :-1].reshape(3 * 39, -1)
    small_pieces(monkeypatch, 10 * expected.shape[1])
    seen, side = tokens_in_forward(model), LanguageModelInPieces(model)
    found = side.predictions(BATCH)
    assert found.num_rows == 117 and found.step == 10
    rows = all_rows(found)
    assert float((rows - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert max(seen) <= 10 * width  # the head never saw more
    before = len(seen)
    assert torch.equal(all_rows(side.predictions(BATCH)), rows) and len(seen) == before + 12  # judged once
    assert torch.equal(side(BATCH), model(input_ids=IDS).logits)


class Odd(nn.Module):
    """A language model whose logits hang on where a token stands: pieces of them would be others."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.base = nn.Embedding(160, 8)
        self.head = nn.Linear(8, 160)
        self.device = torch.device("cpu")

    @property
    def base_model(self) -> nn.Module:
        return self if self.kind == "no base" else self.base

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.kind == "no head" else self.head

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.base(input_ids)  # a tensor, not a record with hidden states
        if self.kind == "places":
            hidden = (hidden,)[0] + torch.arange(input_ids.shape[1])[None, :, None]
        return type("Output", (), {"logits": self.head(hidden)})()


class OddBase(nn.Embedding):
    def forward(self, input: Tensor) -> Any:
        return (super().forward(input),)


class OddPlaces(Odd):
    def __init__(self) -> None:
        super().__init__("places")
        self.base = OddBase(160, 8)

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.base(input_ids)[0]
        return type("Output", (), {"logits": self.head(hidden + torch.arange(hidden.shape[1])[None, :, None])})()


@pytest.mark.parametrize("model", [Odd("no base"), Odd("no head"), Odd("plain"), OddPlaces()])
@torch.inference_mode()
def test_another_model_is_called_as_a_whole(model: Any) -> None:
    found = LanguageModelInPieces(model).predictions(BATCH)
    expected = model(IDS).logits[:, :-1].reshape(117, 160)
    assert found.step > 117 and torch.equal(all_rows(found), expected)


@torch.inference_mode()
def test_a_head_that_rounds_its_inputs_sees_all_of_them() -> None:
    """Where a format has a scale for the whole tensor, a piece would have another one."""
    model = tiny_model("llama", tie_word_embeddings=False)
    microscale.quantize(model, "nvfp4", activations="nvfp4", include=["lm_head"])
    assert isinstance(model.lm_head, QuantizedLinear) and model.lm_head.activations is not None
    expected = model(input_ids=IDS).logits[:, :-1].reshape(117, -1)
    assert torch.equal(all_rows(LanguageModelInPieces(model).predictions(BATCH)), expected)


def test_calls_are_counted_as_those_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    microscale.quantize(model, "mxfp4", include=["lm_head"])
    small_pieces(monkeypatch, 10 * 160)
    with torch.inference_mode(), count_executions() as counts:
        all_rows(LanguageModelInPieces(model).predictions(BATCH))
    with torch.inference_mode(), count_executions() as expected:
        model(input_ids=IDS)
    assert counts == expected


def test_scores_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, 7 * 160)
    model, reference = tiny_model("llama"), tiny_model("gemma2")
    windows = [*IDS, torch.arange(3, 20)]
    sides = LanguageModelInPieces(model), LanguageModelInPieces(reference)
    whole = sides[0].__call__, sides[1].__call__  # a method has no predictions
    found, expected = perplexity(sides[0], windows), perplexity(whole[0], windows)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6) and found.tokens == expected.tokens
    one, other = fidelity(*sides, windows), fidelity(*whole, windows)
    for name in ("perplexity", "reference_perplexity", "kl_mean", "kl_p99", "kl_max", "agreement"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4), name
    mixed = fidelity(sides[0], whole[1], windows)  # pieces of two sizes
    assert mixed.kl_mean == pytest.approx(other.kl_mean, rel=1e-4)
