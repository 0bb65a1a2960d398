"""How a batch becomes a call: by the words that a model takes, its family's runner, or its structure."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from microscale.errors import ModelError
from microscale.families.batch import Batch
from microscale.families.records import FAMILIES
from microscale.families.running import predict, run_model, runner_of, takes
from tiny_models import tiny_config, tiny_model

IDS = torch.arange(12).reshape(4, 3)
PIXELS = torch.rand(4, 2, 2)


def test_a_batch_becomes_the_keywords_of_a_call() -> None:
    def model(**given: Any) -> dict[str, Any]:
        return given

    batch = Batch(token_ids=IDS, others={"pixel_values": PIXELS})
    given = run_model(model, batch, logits_to_keep=1)
    assert given == {"input_ids": IDS, "pixel_values": PIXELS, "use_cache": False, "logits_to_keep": 1}
    assert run_model(model, batch, use_cache=True)["use_cache"] is True


class Plain(nn.Module):
    """It takes ids and nothing else, as a model of one's own may."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids + 1


def test_a_model_is_given_only_what_it_takes() -> None:
    assert torch.equal(run_model(Plain(), Batch(token_ids=IDS)), IDS + 1)
    assert takes(Plain(), "input_ids") and not takes(Plain(), "use_cache")


def test_a_model_with_an_encoder_reads_the_text_on_both_sides() -> None:
    model = tiny_model("t5", decoder_start_token_id=0)
    with torch.no_grad():
        found = run_model(model, Batch(token_ids=IDS)).logits
        expected = model(input_ids=IDS, decoder_input_ids=IDS, use_cache=False).logits
        other = {"decoder_input_ids": IDS.flip(1)}
        given = run_model(model, Batch(token_ids=IDS, others=other)).logits
        wanted = model(input_ids=IDS, use_cache=False, **other).logits
    assert torch.equal(found, expected) and torch.equal(given, wanted)


def test_a_family_brings_a_runner_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(model: Any, batch: Batch, **options: Any) -> Any:
        return model(input_ids=batch.token_ids.flip(1), **options)

    model, batch = tiny_model("llama"), Batch(token_ids=IDS)
    with torch.no_grad():
        expected = model(input_ids=IDS.flip(1), use_cache=False).logits
        record = dataclasses.replace(FAMILIES["llama"], runner=backwards)
        monkeypatch.setitem(FAMILIES, "llama", record)  # type: ignore[arg-type]
        assert runner_of(model) is backwards
        assert torch.equal(run_model(model, batch).logits, expected)


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_model_that_predicts_no_token_is_named(kind: str) -> None:
    model = getattr(transformers, kind)(tiny_config("llama")).eval()
    with torch.no_grad(), pytest.raises(ModelError, match=f"{kind} does not predict the next token of a text"):
        predict(model, Batch(token_ids=IDS))


def test_predictions_are_the_models_logits() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        assert torch.equal(predict(model, Batch(token_ids=IDS)), model(input_ids=IDS, use_cache=False).logits)
        assert predict(model, Batch(token_ids=IDS), logits_to_keep=1).shape == (4, 1, 160)
