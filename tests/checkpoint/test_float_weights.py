"""Scales of tensors, rows and blocks, and the weights that FP8, integer and 4-bit files mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from microscale.checkpoint.float_weights import (
    block_of,
    check_scale,
    compressed_weights,
    exponent_scale,
    four_bits,
    fp8_weights,
    modelopt_weights,
    spread,
    unpacked,
)
from microscale.checkpoint.schema import TensorInfo
from microscale.errors import CheckpointError
from small_models import same_bits


def infos(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("shape", "scale", "blocks", "expected"),
    [
        ((256, 704), (), None, [256, 704]),
        ((256, 704), (1,), None, [256, 704]),
        ((256, 704), (256,), None, [1, 704]),
        ((256, 704), (256, 1), None, [1, 704]),
        ((256, 704), (2, 6), [128, 128], [128, 128]),
        ((256, 704), (2, 6), None, None),
        ((256, 704), (256, 22), None, [1, 32]),
        ((4, 256, 128), (4, 2, 1), [128, 128], [1, 128, 128]),
        ((4, 256, 128), (4, 1, 1), None, [1, 256, 128]),
        ((256, 704), (3, 6), [128, 128], None),
        ((256, 704), (2, 6, 1), [128, 128], None),
    ],
)
def test_which_values_share_a_scale(
    shape: tuple[int, ...], scale: tuple[int, ...], blocks: list[int] | None, expected: list[int] | None
) -> None:
    assert block_of(shape, scale, blocks) == expected
    if expected is None:
        with pytest.raises(CheckpointError, match="do not fit"):
            check_scale("w", shape, scale, blocks)
        return
    values = torch.arange(1.0, 1 + torch.Size(scale).numel()).reshape(scale)
    large = spread(values, shape, blocks).expand(shape)
    for place in [(0,) * len(shape), tuple(length - 1 for length in shape)]:
        at = tuple(p // size for p, size in zip(place, expected, strict=True))
        own = values.reshape(1) if values.numel() == 1 else values.reshape(*scale, *(1,) * (len(shape) - len(scale)))
        assert large[place] == (own[0] if values.numel() == 1 else own[at])


def test_stacked_experts_in_fp8() -> None:
    """A scale for each block of each expert; an FP8 tensor without scales is cast."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 256, 128, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, 1, generator=generator)
    tensors = {"experts.up": weight, "experts.up_scale_inv": scale, "plain": weight[0]}
    found = fp8_weights(infos(tensors), {"weight_block_size": [128, 128]})
    assert set(found) == {"experts.up", "plain"} and found["experts.up"].shape == (3, 256, 128)
    made = found["experts.up"].make(tensors.__getitem__)
    assert same_bits(made[2, 200], weight[2, 200].float() * scale[2, 1, 0])
    assert same_bits(found["plain"].make(tensors.__getitem__), weight[0].float())


def test_codes_of_four_bits_lie_low_first() -> None:
    packed = torch.tensor([[0x10, 0x7F]], dtype=torch.uint8)
    assert four_bits(packed).tolist() == [[0.0, 0.5, -6.0, 6.0]]
    assert exponent_scale(torch.tensor([127, 126, 130], dtype=torch.uint8)).tolist() == [1.0, 0.5, 8.0]
    assert unpacked(torch.tensor([[-1985229329]], dtype=torch.int32), 4).tolist() == [[15, 14, 13, 12, 11, 10, 9, 8]]


def test_mx_layers_of_compressed_tensors_among_others() -> None:
    tensors = {
        "a.weight": torch.ones(2, 32).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.full((2, 1), 128, dtype=torch.uint8),
        "b.weight_packed": torch.full((2, 16), 0x22, dtype=torch.uint8),
        "b.weight_scale": torch.full((2, 1), 126, dtype=torch.uint8),
    }
    found = compressed_weights(infos(tensors), {"config_groups": {}})
    assert found["a.weight"].make(tensors.__getitem__).unique().tolist() == [2.0]
    assert found["b.weight"].make(tensors.__getitem__).unique().tolist() == [0.5]
    with pytest.raises(CheckpointError, match="sparse"):
        compressed_weights(infos(tensors), {"sparsity_config": {"format": "sparse-24-bitmask"}})


def test_scaled_inputs_of_modelopt_go_into_the_columns() -> None:
    tensors = {
        "a.weight": torch.ones(2, 4).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.tensor(0.5),
        "a.pre_quant_scale": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    }
    made = modelopt_weights(infos(tensors), {})["a.weight"].make(tensors.__getitem__)
    assert made.tolist() == [[0.5, 1.0, 1.5, 2.0]] * 2
