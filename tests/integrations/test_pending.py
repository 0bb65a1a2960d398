"""What stands for a tensor that is still in its file: read when it is taken, in the dtype of its place, or never."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from microscale.integrations.pending import AbsentTensor, PendingTensor


@pytest.mark.parametrize(("wanted", "asked"), [(None, None), (torch.bfloat16, None), (torch.float32, torch.float32)])
def test_a_pending_tensor_is_cast_while_it_is_read(wanted: torch.dtype | None, asked: torch.dtype | None) -> None:
    """A cast to the dtype that it has anyway is none."""
    calls: list[torch.dtype | None] = []

    def load(dtype: torch.dtype | None) -> Tensor:
        calls.append(dtype)
        return torch.ones(2, dtype=dtype or torch.bfloat16)

    pending = PendingTensor(dtype=torch.bfloat16, load=load, wanted=wanted)
    assert calls == [], "nothing is read before it is taken"
    assert pending[...].dtype == (asked or torch.bfloat16) and calls == [asked]


@pytest.mark.parametrize(("dtype", "is_float"), [(torch.bfloat16, True), (torch.uint8, False), (torch.int32, False)])
def test_only_floats_may_be_cast(dtype: torch.dtype, is_float: bool) -> None:
    assert PendingTensor(dtype=dtype, load=lambda _: torch.empty(0)).is_floating_point() is is_float
    assert AbsentTensor(dtype=dtype, shape=(2,)).is_floating_point() is is_float


def test_an_absent_tensor_has_a_shape_and_no_content_on_any_device() -> None:
    absent = AbsentTensor(dtype=torch.bfloat16, shape=(3, 5))
    assert absent[...] is absent
    for found in (absent.to("cpu"), absent.to(device="cuda"), absent[...].to()):
        assert found.is_meta and (tuple(found.shape), found.dtype) == ((3, 5), torch.bfloat16)
    assert absent.to("cpu", torch.float16).dtype == torch.float16
