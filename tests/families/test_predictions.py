"""Predictions in logits that are there as a whole: all tokens but the last of each sample predict the next."""

from __future__ import annotations

import torch

from microscale.families.predictions import MOST_ROWS, whole_predictions


def test_rows_go_sample_by_sample_and_leave_the_last_out() -> None:
    logits = torch.arange(2 * 4 * 3, dtype=torch.float32).reshape(2, 4, 3)
    found = whole_predictions(logits)
    assert (found.num_rows, found.step) == (6, MOST_ROWS)
    assert torch.equal(found.rows_at(0, 6), torch.cat([logits[0, :3], logits[1, :3]]))
    assert torch.equal(found.rows_at(2, 4), torch.stack([logits[0, 2], logits[1, 0]]))
