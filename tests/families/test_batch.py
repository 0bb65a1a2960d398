"""A model's input as a record: samples taken together, and the call that it becomes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from microscale.errors import ShapeError
from microscale.families.batch import Batch, run_model

IDS = torch.arange(12).reshape(4, 3)
PIXELS = torch.rand(4, 2, 2)


def test_samples_keep_what_belongs_to_them() -> None:
    batch = Batch(token_ids=IDS, others={"pixel_values": PIXELS})
    pieces = list(batch.split(3))
    assert [len(piece) for piece in pieces] == [3, 1] and len(batch) == 4
    assert torch.equal(pieces[1].token_ids, IDS[3:]) and torch.equal(pieces[1].others["pixel_values"], PIXELS[3:])
    chosen = batch[torch.tensor([2, 0])]
    assert torch.equal(chosen.others["pixel_values"], PIXELS[[2, 0]]) and torch.equal(chosen.token_ids, IDS[[2, 0]])


def test_another_number_of_samples_is_refused() -> None:
    with pytest.raises(ShapeError, match="pixel_values holds 3 samples, the token ids 4"):
        Batch(token_ids=IDS, others={"pixel_values": PIXELS[:3]})


def test_a_batch_becomes_the_keywords_of_a_call() -> None:
    def model(**given: Any) -> dict[str, Any]:
        return given

    batch = Batch(token_ids=IDS, others={"pixel_values": PIXELS})
    given = run_model(model, batch, logits_to_keep=1)
    assert given == {"input_ids": IDS, "pixel_values": PIXELS, "use_cache": False, "logits_to_keep": 1}
    assert run_model(model, batch, use_cache=True)["use_cache"] is True
