"""What a calibration is made of: its windows as the batch that a model is given."""

from __future__ import annotations

import torch

from microscale.recipes.calibration import Calibration


def test_windows_are_the_tokens_of_one_batch() -> None:
    windows = torch.arange(12).reshape(3, 4)
    samples = Calibration(windows=windows).samples
    assert samples.token_ids is windows, "nothing is copied"
