"""Which layers a budget is spread over: roles, choices by hand, fused layers."""

from __future__ import annotations

from typing import Any

import pytest

from measured_models import FORMATS
from microscale.errors import AllocationError
from microscale.planning.allocated_layers import allocated_layers, parse_fixed
from microscale.planning.candidates import parse_candidates


@pytest.mark.parametrize("text", ["mlp.down", "=mxfp8", "norm=mxfp8", "kv_cache=mxfp4/mxfp8", "mlp.down=mxfp5"])
def test_bad_choices_by_hand(text: str) -> None:
    with pytest.raises(AllocationError):
        parse_fixed(text)


def test_a_role_that_the_model_lacks(model: Any) -> None:
    with pytest.raises(AllocationError, match=r"roles of this model: attention\.out, attention\.qkv, embedding"):
        allocated_layers(model, FORMATS, fixed=[parse_fixed("moe.gate=mxfp8")])
    with pytest.raises(AllocationError, match="leave layers alone"):
        allocated_layers(model, parse_candidates("none"))
