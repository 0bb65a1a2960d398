"""The form of what a decoder layer returns, kept in a file and given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from microscale.layerwise.returned import CARRIED, Returned

HIDDEN = torch.ones(2)
FORMS: list[tuple[Any, Any]] = [
    (torch.zeros(2), HIDDEN),
    ((torch.zeros(2),), (HIDDEN,)),
    ((torch.zeros(2), None, torch.zeros(1)), (HIDDEN, None, CARRIED)),
    ([torch.zeros(2), None], [HIDDEN, None]),
]


@pytest.mark.parametrize(("output", "given"), FORMS)
def test_a_stand_in_returns_what_the_layer_would(output: Any, given: Any) -> None:
    returned = Returned.of(output)
    assert Returned.from_facts(returned.facts) == returned
    for found in (returned.giving(HIDDEN), returned.stand_in(HIDDEN)(1, other=2)):
        assert type(found) is type(given)
        if isinstance(found, tuple | list):
            assert len(found) == len(given) and all(one is other for one, other in zip(found, given, strict=True))
        else:
            assert found is HIDDEN
