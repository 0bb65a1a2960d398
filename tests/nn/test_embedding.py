"""Tables that are narrower in memory than in use: only rows that are asked for are made wide."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from format_specs import SPECS
from microscale.kernels import Operation, count_executions, dequantize, quantize
from microscale.nn.embedding import NarrowEmbedding
from microscale.nn.inference import cached_weights
from packed_modules import COLS, INDICES, ROWS, packed_embedding, weight
from small_models import same_bits


@pytest.mark.parametrize("spec", SPECS)
def test_looking_up_rows_is_that_of_the_dequantized_table(spec: str) -> None:
    table = packed_embedding(spec)
    restored = dequantize(quantize(weight(), spec))
    for indices in (INDICES, INDICES[0], INDICES[0, 0], torch.empty(0, dtype=torch.int64), INDICES.to(torch.int32)):
        expected = functional.embedding(indices, restored)
        assert same_bits(table(indices), expected)
        with cached_weights(table):
            assert same_bits(table(indices), expected)
    assert table(INDICES).shape == (2, 3, COLS)


def test_a_narrow_table_is_the_table_cast_as_a_whole() -> None:
    table = NarrowEmbedding(ROWS, COLS, dtype=torch.bfloat16, output_dtype=torch.float32)
    table.weight = weight()
    for indices in (INDICES, INDICES[0, 0], torch.empty(0, dtype=torch.int64)):
        assert same_bits(table(indices), functional.embedding(indices, weight().to(torch.float32)))
    for cast in (torch.float16, torch.float32, torch.bfloat16):
        table.to(cast)
        assert table.weight.dtype == torch.bfloat16, "the table stays as it is stored"
        assert same_bits(table(INDICES), functional.embedding(INDICES, weight()).to(cast))
    assert list(table.state_dict()) == ["weight"] and not list(table.parameters())
    assert "bfloat16" in repr(table)


@pytest.mark.parametrize("spec", ["mxfp4", "adaptive_2_4"])
@pytest.mark.parametrize("index", [ROWS, -ROWS - 1])
def test_a_row_that_is_not_there(spec: str, index: int) -> None:
    with pytest.raises(IndexError):
        packed_embedding(spec)(torch.tensor([index]))


def test_only_the_rows_asked_for_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    table, seen = packed_embedding("mxfp4"), list[tuple[int, ...]]()

    def spy(tensor, dtype):
        seen.append(tensor.shape)
        return dequantize(tensor, dtype)

    monkeypatch.setattr("microscale.nn.embedding.dequantize", spy)
    table(INDICES)
    assert seen == [(6, COLS)]
    with cached_weights(table), count_executions() as counts:
        table(INDICES)
    assert counts[Operation.DEQUANTIZE, "cpu"] + counts[Operation.DEQUANTIZE, "reference"] == 0


def test_a_narrow_table_says_what_it_is_and_moves_with_its_device() -> None:
    table = NarrowEmbedding(ROWS, COLS, dtype=torch.bfloat16, output_dtype=torch.float32)
    assert "48x80, torch.bfloat16" in repr(table)
    moved = nn.Sequential(table).to("meta")[0]
    assert moved.weight.is_meta and moved.weight.dtype == torch.bfloat16
    assert moved(INDICES.to("meta")).dtype == torch.float32
