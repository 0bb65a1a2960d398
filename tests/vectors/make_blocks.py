"""Write blocks.json: named cases with exact bytes, the one bitwise contract of every backend.

Run ``python tests/vectors/make_blocks.py`` after the golden tests have passed, and only when the contract itself
changes: a backend that disagrees with the file is wrong, not the file. With ``--check`` nothing is written; the
exit status says whether the file is up to date.

File: ``inputs`` maps a name to dtype, shape and bytes; a case names its input, a format, maybe an amax, and holds
the bytes of every part and of the dequantized values (in the input's dtype). All bytes are hexadecimal and
little-endian. A NaN among dequantized values stands for any NaN.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from microscale.formats import NAMED_FORMATS, Draw
from microscale.formats.codec import random_bits
from microscale.kernels import dequantize, quantize
from microscale.tensor import QuantizedTensor

PATH = Path(__file__).with_name("blocks.json")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
}
FLOAT32_MAX = float(torch.finfo(torch.float32).max)
SUBNORMAL = 2.0**-149


def to_hex(tensor: torch.Tensor) -> str:
    """The bytes of a tensor."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()).hex()


def from_hex(text: str, dtype: str, shape: list[int]) -> torch.Tensor:
    """The tensor of these bytes."""
    data = torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
    return data.view(DTYPES[dtype]).reshape(shape)


def described(tensor: torch.Tensor) -> dict[str, Any]:
    """Dtype, shape and bytes."""
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "hex": to_hex(tensor)}


def bell(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Roughly Gaussian numbers, the same on every machine: sums of four uniform 24-bit integers."""
    uniform = random_bits(torch.arange(rows * cols * 4), Draw(seed=seed)).reshape(rows, cols, 4)
    return (uniform.sum(-1) - 2**25).to(torch.float32) * 2.0**-23


def ordinary() -> torch.Tensor:
    """Finite numbers of ordinary size, 4 x 72: bell-shaped with outliers, ties, powers of two, a row far from zero."""
    rows = bell(4, 72, seed=2026)
    rows[0, 7], rows[0, 40] = -9.84, 17.5
    grid = torch.tensor([0.0, 0.25, -0.5, 0.75, 1.0, 1.25, 1.75, -2.5, 3.5, 5.0, 6.0, -6.5, 7.0, 7.25, 7.5, 7.75])
    rows[1, :64] = torch.cat([grid, -grid / 2, grid * 64, grid / 1024])
    rows[2, :36] = torch.exp2(torch.arange(-18, 18).float())
    rows[3] = rows[3].abs() * 0.01 + 3.0
    return rows


def edges() -> torch.Tensor:
    """Finite edges, 7 x 40: zero block, -0, equal maxima, subnormals, both ends of float32, ties at a maximum."""
    rows = bell(7, 40, seed=7) * 0.5
    rows[0] = 0.0
    rows[1, :32] = -0.0
    rows[1, 33:36] = torch.tensor([5.0, -5.0, 5.0])
    rows[2, :6] = torch.tensor([SUBNORMAL, -3 * SUBNORMAL, 2.0**-127, -(2.0**-126), 2.0**-130, -0.0])
    rows[2, 6:] *= 2.0**-126
    rows[3] *= 2.0**-124
    rows[4, :4] = torch.tensor([FLOAT32_MAX, 3e38, -1.7e38, 2.0**127])
    rows[4, 32:] *= 2.0**-149 / 0.01
    rows[5, :8] = torch.tensor([448.0, 464.0, -480.0, 511.9, 57344.0, 61440.0, -65535.0, 65536.0])
    rows[6] = 0.375
    return rows


def special() -> torch.Tensor:
    """NaN and Inf, 4 x 40: one block with NaN, one with Inf, one with both signs, one clean row."""
    rows = bell(4, 40, seed=11)
    rows[0, 3] = math.nan
    rows[1, 35], rows[1, 0] = math.inf, -math.inf
    rows[2, 39], rows[2, 38] = -math.nan, -0.0
    return rows


def inputs() -> dict[str, torch.Tensor]:
    """All inputs by name."""
    made = {"ordinary": ordinary(), "edges": edges(), "special": special()}
    made["ordinary_bf16"] = made["ordinary"].to(torch.bfloat16)
    made["special_fp16"] = made["special"].to(torch.float16)
    made["vector"] = made["ordinary"][0, :33].clone()
    made["cube"] = made["ordinary"][:4].reshape(2, 2, 72)[..., :20].clone()
    return made


@dataclass(frozen=True)
class Case:
    """One line of the contract."""

    name: str
    input: str
    format: str
    amax: float | None = None


RULES = (
    "ceil",
    "rceil",
    "even",
    "even(1)",
    "threshold(7)",
    "threshold(7.25)",
    "prescale",
    "std",
    "mse",
    "percentile(90)",
)
ROUNDINGS = ("nearest_away", "toward_zero", "stochastic(42)")
VARIANTS = (
    *(f"{name}:{rule}" for name in ("mxfp4", "mxfp8", "mxint8") for rule in (*RULES, "floor")),
    *(f"{name}:{rounding}" for name in ("mxfp4", "mxfp8", "mxint4", "nvfp4", "mxfp4_plus") for rounding in ROUNDINGS),
    *("mxfp4_plusplus:stochastic(9)", "int4_asym:stochastic(7)", "mxfp8:floor:nonfinite", "mxfp8_e5m2:floor:nonfinite"),
    *("e2m1/16:e4m3", "e2m1/16:e4m3:rceil", "e2m1/16:ue4m3:threshold(7)", "int4/16:fp16", "int8/32:bf16"),
    "e4m3/32:fp32",
    *("e2m1/16:e5m2:std", "e2m1/16:fp16:percentile(90)", "nvfp4:threshold(7)", "e4m3/channel:fp32", "e4m3/tensor:fp32"),
    *("int8/channel:fp16", "int8/tensor:e8m0", "e2m1/4x8:e8m0", "e4m3/3x16:fp32", "int4/2x40:e4m3+fp32"),
    *("e3m2/16:e8m0:rceil", "e3m4/32:e8m0", "e0m3/8:e8m0", "e1m2/32:e8m0", "e3m0/32:e8m0", "bf16/32:e8m0"),
    "fp16/32:e8m0",
    *("e5m10-b20/16:e8m0", "e4m3-ieee/32:e8m0", "e2m1-b5/32:e5m0", "ue4m3/32:e8m0", "uint4/32:fp16"),
    "int4-full/32:e8m0",
    *("int3/20:e8m0", "e2m1/32:e4m0-b3", "int7-f3/16:e8m0:even", "e6m9/8:e8m0"),
    *("e2m1/16:e8m0:plus", "e2m1/20:e8m0:plus", "e2m1/64:e8m0:plusplus", "e2m1/72:e8m0:plus", "e3m2/32:e8m0:plusplus"),
    *("e5m2/32:e8m0:plus", "e2m1/16:fp16:plus", "int8/16:e4m3+fp32:plus", "bf16/32:e8m0:plus"),
    *("e2m1/32:e8m0:sub(8,2,linear)", "e2m1/32:e8m0:sub(8,3,pow2)", "e2m1/16:e4m3+fp32:sub(4,1,linear)"),
    *("int4/32:fp32:asym(fp8)", "int4/32:fp16:asym(fp16)", "int8/16:bf16:asym", "int2/8:fp32:asym(fp16)"),
    *("int3/channel:fp16:asym", "int5/4x8:fp32:asym(fp8)", "int4/32:e4m3+fp32:asym(fp16)"),
    *("mxfp4+sparse5%:fp16", "mxfp4_plus+sparse3%:fp8", "nvfp4+sparse2%:fp16"),
    *("pair(mxfp4,mxfp8,25%)", "pair(mxfp4_plus,mxint8,50%)", "pair(mxfp4,mxfp6_e2m3,0%)", "pair(mxfp4,mxfp8,100%)"),
    *("pair(int2/16:fp16:asym,e2m1/16:e4m3,40%)+sparse2%:fp8", "pair(mxfp4:stochastic(1),mxfp8:stochastic(2),50%)"),
)  # fmt: skip
POLICIES = ("mxfp4:inf_saturate", "mxfp8:inf_saturate:nonfinite", "nvfp4:inf_saturate", "mxfp4_plus:inf_saturate")
CAN_POISON = (
    *(name for name in NAMED_FORMATS),
    *("mxfp8:floor:nonfinite", "e2m1/16:fp16", "int8/32:bf16", "e4m3/32:fp32", "e2m1/4x8:e8m0", "e2m1/32:e5m0"),
    *("int4/32:fp32:asym(fp8)", "e2m1/32:e8m0:sub(8,2,linear)", "mxfp4:std", "mxfp4:mse", "mxfp4:percentile(90)"),
    *("pair(mxfp4,mxfp8,25%)", "mxfp4+sparse5%:fp16", "e4m3/channel:fp32"),
)


def cases() -> list[Case]:
    """Every case, in a fixed order; the name is the format and the input."""
    pairs: list[tuple[str, str, float | None]] = []
    pairs += [(spec, "ordinary", None) for spec in (*NAMED_FORMATS, *VARIANTS)]
    pairs += [(spec, "edges", None) for spec in (*NAMED_FORMATS, *(f"mxfp4:{rule}" for rule in RULES))]
    pairs += [(spec, "special", None) for spec in (*CAN_POISON, *POLICIES)]
    pairs += [(name, "ordinary_bf16", None) for name in ("mxfp4", "mxfp8", "nvfp4", "mxfp4_plus", "int4_asym")]
    pairs += [(name, "special_fp16", None) for name in ("mxfp4", "nvfp4", "mxfp4_plusplus")]
    pairs += [(name, "vector", None) for name in ("mxfp4", "mxfp4_plus", "e4m3/tensor:fp32")]
    pairs += [(name, "cube", None) for name in ("nvfp4_plus", "mxfp6_e3m2", "mxfp4_sparse", "adaptive_2_4")]
    pairs += [("mxfp4", "ordinary", 3.0), ("nvfp4", "ordinary", 40.0), ("nvfp4", "ordinary", 5.0)]
    pairs += [("e4m3/tensor:fp32", "ordinary", 2.0), ("int8/channel:fp32", "ordinary", 4.0)]
    return [
        Case(f"{spec} of {name}" + ("" if amax is None else f" with amax {amax:g}"), name, spec, amax)
        for spec, name, amax in pairs
    ]


def quantized(case: Case, values: torch.Tensor) -> QuantizedTensor:
    """Run a case on whatever backend the dispatcher takes."""
    amax = None if case.amax is None else torch.tensor(case.amax)
    return quantize(values, case.format, amax=amax)


def build() -> str:
    """The text of the file: one line for each input and each case."""
    made = inputs()
    lines = ['{"about": "see make_blocks.py beside this file",', '"inputs": {']
    lines.append(",\n".join(f"{json.dumps(name)}: {json.dumps(described(values))}" for name, values in made.items()))
    lines += ["},", '"cases": [']
    rows: list[str] = []
    for case in cases():
        packed = quantized(case, made[case.input])
        row: dict[str, Any] = {"name": case.name, "input": case.input, "format": case.format}
        if case.amax is not None:
            row["amax"] = case.amax
        row["parts"] = {name: described(part) for name, part in packed.parts.items()}
        row["values"] = to_hex(dequantize(packed))
        rows.append(json.dumps(row))
    lines += [",\n".join(rows), "]}"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the file, or compare it."""
    text = build()
    if "--check" in sys.argv[1:]:
        return 0 if PATH.exists() and PATH.read_text() == text else 1
    PATH.write_text(text)
    sys.stdout.write(f"{PATH}: {len(cases())} cases, {len(text)} bytes\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
