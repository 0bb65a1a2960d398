"""The compiled operations of a decoder: the layout of the cache, what is refused, and calls that are bound."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from microscale.formats import parse_format
from microscale.kernels import KeyValueCache, Operation, Request
from microscale.kernels.cpu import decoder, native
from microscale.kernels.decoder_ops import linear_dense
from microscale.kernels.plan import bind, run

needs_kernels = pytest.mark.skipif(native.NATIVE is None, reason="the extension is not built")
CPU = torch.device("cpu")
REQUEST = Request(
    operation=Operation.ATTEND, format=None, device=CPU, dtype=torch.float32, layout="lanes16", stored=torch.bfloat16
)


@pytest.mark.parametrize(("head_dim", "padded"), [(8, 16), (16, 16), (40, 48), (128, 128)])
def test_keys_lie_sixteen_side_by_side_and_values_are_padded(head_dim: int, padded: int) -> None:
    keys, values = decoder.CACHE.allocate(64, 3, head_dim, torch.bfloat16, CPU)
    assert (tuple(keys.shape), tuple(values.shape)) == ((3, 4, head_dim, 16), (3, 64, padded))
    assert not keys.any() and not values.any() and keys.dtype == values.dtype == torch.bfloat16


def test_a_cache_is_read_position_by_position() -> None:
    """keys[head, p / 16, d, p % 16] is number d of position p."""
    keys, values = decoder.CACHE.allocate(64, 2, 8, torch.float32, CPU)
    keys.copy_(torch.arange(keys.numel()).reshape(keys.shape))
    values.copy_(torch.arange(values.numel()).reshape(values.shape))
    cache = KeyValueCache(
        stored=torch.float32, layout="lanes16", kv_heads=2, head_dim=8, capacity=64,
        length=torch.zeros(1, dtype=torch.int64), keys=keys, values=values,
    )  # fmt: skip
    read_keys, read_values = decoder.CACHE.read(cache)
    assert tuple(read_keys.shape) == tuple(read_values.shape) == (2, 64, 8)
    for head, position, number in ((0, 0, 0), (1, 17, 3), (1, 63, 7), (0, 15, 5)):
        assert read_keys[head, position, number] == keys[head, position // 16, number, position % 16]
        assert read_values[head, position, number] == values[head, position, number]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"stored": torch.float32, "operation": Operation.STORE_HEADS}, None),
        ({"dtype": torch.bfloat16}, "computes attend in float32 only, not torch.bfloat16"),
        ({"layout": "row_major"}, "reads caches in the layout lanes16 only, not row_major"),
        ({"stored": torch.float16}, "keeps keys and values in float32 or bfloat16 only, not torch.float16"),
        ({"operation": Operation.GATE, "layout": "row_major", "stored": None}, None),
        ({"operation": Operation.GATE, "dtype": torch.float16}, "computes gate in float32 only, not torch.float16"),
        (
            {
                "operation": Operation.LINEAR_GROUP,
                "group_size": 2,
                "format": parse_format("segments(mxfp4*32,mxfp8*32)"),
                "layout": "rows16",
            },
            "gives a weight of segments a call of its own",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, object], reason: str | None) -> None:
    assert decoder.decoder_refusal(dataclasses.replace(REQUEST, **changes)) == reason


def whole_numbers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@needs_kernels
@pytest.mark.parametrize("rows", [1, decoder.FEW_ROWS, decoder.FEW_ROWS + 1])
def test_few_and_many_rows_of_a_bfloat16_weight(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers sum exactly, whichever product is taken and however the weight is cut."""
    monkeypatch.setattr(decoder, "CAST_ROWS", 3)
    inputs, weight, bias = whole_numbers(rows, 40, seed=1), whole_numbers(10, 40, seed=2), whole_numbers(10, seed=3)
    out = torch.empty(rows, 10)
    run(linear_dense(inputs, weight.to(torch.bfloat16), bias, out))
    assert torch.equal(out, inputs @ weight.T + bias)


@needs_kernels
def test_a_bound_call_holds_its_memory_and_reads_it_anew() -> None:
    out = torch.empty(1, 10)
    inputs, weight = whole_numbers(1, 40, seed=1), whole_numbers(10, 40, seed=2)
    plan = bind([linear_dense(inputs, weight, None, out)])
    expected = inputs @ weight.T
    inputs.mul_(2)
    del weight  # the plan keeps it
    plan.run()
    assert torch.equal(out, 2 * expected)
