"""The parts of a stored tensor: names, shapes, dtypes, and their size against the bits that a format promises."""

from __future__ import annotations

import pytest
import torch

from microscale.errors import ShapeError
from microscale.formats import NAMED_FORMATS, parse_format
from microscale.formats.elements import E8M0
from microscale.layouts import PartSpec, matrix_shape, part_specs
from microscale.layouts.row_major import grid_shape, high_count, padded_cols, scale_dtype, sparse_count

U8, I16, I32, F16, BF16, F32 = torch.uint8, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "spec, shape, expected",
    [
        ("mxfp4", (3, 64), {"codes": (U8, (3, 32)), "scale": (U8, (3, 2))}),
        ("mxfp4", (3, 40), {"codes": (U8, (3, 32)), "scale": (U8, (3, 2))}),  # padded to whole blocks
        ("mxfp6_e2m3", (3, 64), {"codes": (U8, (3, 48)), "scale": (U8, (3, 2))}),
        ("mxint8", (2, 3, 32), {"codes": (U8, (6, 32)), "scale": (U8, (6, 1))}),
        ("mxfp4", (64,), {"codes": (U8, (1, 32)), "scale": (U8, (1, 2))}),
        ("nvfp4", (3, 64), {"codes": (U8, (3, 32)), "scale": (U8, (3, 4)), "tensor_inv_scale": (F32, (1,))}),
        ("mxfp4_plus", (3, 96), {"codes": (U8, (3, 48)), "scale": (U8, (3, 3)), "index": (U8, (3, 3))}),
        ("mxfp4_plusplus", (3, 96), {"codes": (U8, (3, 48)), "scale": (U8, (3, 3)), "index": (U8, (3, 3))}),
        (
            "nvfp4_plus",  # index of four bits, two per byte
            (3, 80),
            {"codes": (U8, (3, 40)), "scale": (U8, (3, 5)), "tensor_inv_scale": (F32, (1,)), "index": (U8, (3, 3))},
        ),
        ("int4_asym", (3, 192), {"codes": (U8, (3, 96)), "scale": (F16, (3, 3)), "zero_point": (U8, (3, 2))}),
        (
            "int4/64:fp32:asym(fp8)",
            (3, 192),
            {"codes": (U8, (3, 96)), "scale": (F32, (3, 3)), "zero_point": (U8, (3, 3))},
        ),
        (
            "int3/64:bf16:asym(fp16)",
            (3, 192),
            {"codes": (U8, (3, 72)), "scale": (BF16, (3, 3)), "zero_point": (F16, (3, 3))},
        ),
        (
            "e2m1/32:e8m0:sub(8,3,pow2)",
            (3, 64),
            {"codes": (U8, (3, 32)), "scale": (U8, (3, 2)), "sub_scale": (U8, (3, 3))},
        ),
        ("e4m3/16x8:fp16", (20, 20), {"codes": (U8, (20, 24)), "scale": (F16, (2, 3))}),  # padding rows are not stored
        ("int8/channel:fp32", (5, 7), {"codes": (U8, (5, 7)), "scale": (F32, (5, 1))}),
        ("e4m3/tensor:fp32", (5, 7), {"codes": (U8, (5, 7)), "scale": (F32, (1, 1))}),
        ("bf16/32:e8m0", (5, 7), {"codes": (U8, (5, 64)), "scale": (U8, (5, 1))}),
        (
            "mxfp4+sparse1%:fp8",
            (10, 100),
            {
                "codes": (U8, (10, 64)),
                "scale": (U8, (10, 4)),
                "sparse_values": (U8, (10,)),
                "sparse_columns": (I16, (10,)),
                "sparse_offsets": (I32, (11,)),
                "sparse_scale": (F32, (1,)),
            },
        ),
        (
            "mxfp4+sparse0.01%:fp16",
            (1, 40000),
            {
                "codes": (U8, (1, 20000)),
                "scale": (U8, (1, 1250)),
                "sparse_values": (F16, (4,)),
                "sparse_columns": (I32, (4,)),
                "sparse_offsets": (I32, (2,)),
            },
        ),
        (
            "pair(int2/32:fp16:asym,mxfp8,25%)",
            (4, 128),
            {
                "bitmap": (U8, (4, 1)),
                "low_codes": (U8, (1, 96)),
                "low_scale": (F16, (1, 12)),
                "low_zero_point": (U8, (1, 3)),
                "high_codes": (U8, (1, 128)),
                "high_scale": (U8, (1, 4)),
            },
        ),
    ],
)
def test_parts(spec: str, shape: tuple[int, ...], expected: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    got = part_specs(parse_format(spec), shape)
    assert got == {name: PartSpec(dtype, part) for name, (dtype, part) in expected.items()}
    assert list(got) == list(expected), "file order"


EXACT = [
    *NAMED_FORMATS,
    *("e3m2/16:e8m0", "e2m1/64:e8m0:plus", "e2m1/64:e8m0:plusplus", "e2m1/32:e8m0:sub(8,2,linear)", "int5/8:fp16"),
    *("int8/channel:fp32", "e4m3/tensor:fp32", "int4/16x32:bf16", "int3/64:fp16:asym(fp16)", "e3m5/32:fp32"),
    *(
        "e5m10/32:e8m0",
        "mxfp4_plus+sparse1%:fp16",
        "pair(mxfp4_plus,mxfp8,25%)",
        "pair(mxfp4,mxfp6_e2m3,25%)+sparse1%:fp8",
    ),
]


@pytest.mark.parametrize("spec", EXACT)
def test_sizes_are_the_bits_that_the_format_promises(spec: str) -> None:
    """On a shape where every part fills whole bytes and every share is a whole number."""
    rows, cols = 400, 512
    fmt = parse_format(spec)
    stored = sum(part.num_bytes for part in part_specs(fmt, (rows, cols)).values())
    promised = fmt.bits_per_value(rows, cols) * rows * cols / 8
    assert stored == pytest.approx(promised, rel=1e-12)


def test_matrix_shape() -> None:
    assert [matrix_shape(shape) for shape in [(5,), (3, 4), (2, 3, 4), (0, 4), (3, 0)]] == [
        *((1, 5), (3, 4), (6, 4), (0, 4), (3, 0))
    ]
    with pytest.raises(ShapeError, match="scalar"):
        matrix_shape(())


@pytest.mark.parametrize(
    "block, grid, width",
    [("32", (10, 3), 96), ("7", (10, 10), 70), ("4x16", (3, 5), 80), ("channel", (10, 1), 70), ("tensor", (1, 1), 70)],
)
def test_grid_and_padding(block: str, grid: tuple[int, int], width: int) -> None:
    fmt = parse_format(f"int8/{block}:fp32")
    assert grid_shape(fmt.block, 10, 70) == grid  # type: ignore[union-attr]
    assert padded_cols(fmt.block, 70) == width  # type: ignore[union-attr]


def test_counts_round_half_to_even() -> None:
    sparse = parse_format("mxfp4+sparse0.5%:fp8").sparse
    assert sparse is not None
    assert [sparse_count(sparse, numel) for numel in (1, 99, 100, 101, 300, 500, 1000)] == [0, 0, 0, 1, 2, 2, 5]
    everything = parse_format("mxfp4+sparse100%:fp8").sparse
    assert everything is not None and sparse_count(everything, 7) == 7
    half = parse_format("adaptive_2_4")
    assert [high_count(half, blocks) for blocks in (1, 2, 3, 5, 8)] == [0, 1, 2, 2, 4]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "percent, numel, count", [(0.7, 1000, 7), (99.9, 1000, 999), (0.1, 15000, 15), (1.1, 1000, 11)]
)
def test_shares_are_the_decimal_that_was_written(percent: float, numel: int, count: int) -> None:
    sparse = parse_format(f"mxfp4+sparse{percent}%:fp8").sparse
    assert sparse is not None and sparse_count(sparse, numel) == count


def test_scale_dtypes() -> None:
    dtypes = {"e8m0": U8, "e4m3": U8, "fp16": F16, "bf16": torch.bfloat16, "fp32": F32}
    for word, dtype in dtypes.items():
        fmt = parse_format(f"e2m1/32:{word}")
        assert scale_dtype(fmt) == dtype  # type: ignore[arg-type]
    assert E8M0.bits_stored == 8
