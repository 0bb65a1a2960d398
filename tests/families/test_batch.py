"""A model's input as a record: samples taken together, and the call that it becomes."""

from __future__ import annotations

import pytest
import torch

from microscale.errors import ShapeError
from microscale.families.batch import Batch

IDS = torch.arange(12).reshape(4, 3)
PIXELS = torch.rand(4, 2, 2)


def test_samples_keep_what_belongs_to_them() -> None:
    batch = Batch(token_ids=IDS, others={"pixel_values": PIXELS})
    pieces = list(batch.split(3))
    assert [len(piece) for piece in pieces] == [3, 1] and len(batch) == 4
    assert torch.equal(pieces[1].token_ids, IDS[3:]) and torch.equal(pieces[1].others["pixel_values"], PIXELS[3:])
    chosen = batch[torch.tensor([2, 0])]
    assert torch.equal(chosen.others["pixel_values"], PIXELS[[2, 0]]) and torch.equal(chosen.token_ids, IDS[[2, 0]])


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 4), (2, [2, 2]), (4, [4]), (9, [4])])
def test_pieces_are_the_whole(size: int, lengths: list[int]) -> None:
    pieces = list(Batch(token_ids=IDS, others={"pixel_values": PIXELS}).split(size))
    assert [len(piece) for piece in pieces] == lengths
    assert torch.equal(torch.cat([piece.token_ids for piece in pieces]), IDS)
    assert torch.equal(torch.cat([piece.others["pixel_values"] for piece in pieces]), PIXELS)
    assert list(Batch(token_ids=IDS[:0]).split(size)) == [], "no sample, no piece"


def test_all_of_it_moves_to_a_device() -> None:
    moved = Batch(token_ids=IDS, others={"pixel_values": PIXELS}).to("meta")
    assert moved.token_ids.is_meta and moved.others["pixel_values"].is_meta
    assert moved.token_ids.shape == IDS.shape and not IDS.is_meta


def test_another_number_of_samples_is_refused() -> None:
    with pytest.raises(ShapeError, match="pixel_values holds 3 samples, the token ids 4"):
        Batch(token_ids=IDS, others={"pixel_values": PIXELS[:3]})
