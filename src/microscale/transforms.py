"""Online transforms of a layer's input: what a method leaves to be done at run time, as data.

A transform is a matrix M: the layer computes x' = x M, and its stored weight is W' = W M^-T, so that x' W'^T = x W^T.
The records say what a checkpoint must hold; :mod:`microscale.kernels.transform` applies them.

====================  ===========================================  ==============================================
spec                  x' = x M                                     parts
====================  ===========================================  ==============================================
scale                 x'[i] = x[i] * scale[i]                      scale float32 [cols]
permute               x'[i] = x[order[i]]                          order int32 [cols]
hadamard(b)           blocks of b columns times H_b / sqrt(b)      none
block(b)              block k of b columns times matrix[k]         matrix float32 [cols / b, b, b]
block(b,shared)       every block of b columns times one matrix    matrix float32 [1, b, b]
kronecker(a,b)        x as [a, b]: left^T x right                  left float32 [a, a], right float32 [b, b]
====================  ===========================================  ==============================================

H_b is the Sylvester Hadamard matrix. Sources: arXiv 2511.04214 (block rotation), arXiv 2603.16590 (block affine),
arXiv 2410.09426 (Kronecker affine), arXiv 2211.10438 (scale).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from microscale.errors import FormatError, ShapeError, counted


class AtRunTime(Enum):
    """What a chain may leave to do at run time: transforms and side paths (ONLINE), or nothing (FOLDED).

    File layouts of other tools have no place for anything.
    """

    ONLINE = "online"
    FOLDED = "folded"


class TransformKind(Enum):
    """The words of the specs."""

    SCALE = "scale"
    PERMUTE = "permute"
    HADAMARD = "hadamard"
    BLOCK = "block"
    KRONECKER = "kronecker"


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformSpec:
    """Which transform, without its numbers.

    ``size`` is the block of ``hadamard`` and ``block`` and the inner length b of ``kronecker``, ``outer`` its a.

    Raises:
        FormatError: sizes that the kind does not take.
    """

    kind: TransformKind
    size: int = 0
    outer: int = 0
    is_shared: bool = False

    def __post_init__(self) -> None:
        has_size = self.kind in (TransformKind.HADAMARD, TransformKind.BLOCK, TransformKind.KRONECKER)
        if has_size != (self.size > 0) or (self.kind is TransformKind.KRONECKER) != (self.outer > 0):
            raise FormatError(f"transform {self.kind.value} cannot have the sizes ({self.outer}, {self.size})")
        if self.kind is TransformKind.HADAMARD and self.size & (self.size - 1):
            raise FormatError(f"a Hadamard block is a power of two, got {self.size}")
        if self.is_shared and self.kind is not TransformKind.BLOCK:
            raise FormatError(f"only block transforms can be shared, not {self.kind.value}")

    def __str__(self) -> str:
        match self.kind:
            case TransformKind.SCALE | TransformKind.PERMUTE:
                return self.kind.value
            case TransformKind.HADAMARD:
                return f"hadamard({self.size})"
            case TransformKind.BLOCK:
                return f"block({self.size},shared)" if self.is_shared else f"block({self.size})"
            case TransformKind.KRONECKER:
                return f"kronecker({self.outer},{self.size})"

    def refusal(self, cols: int) -> str | None:
        """Return why the transform cannot act on ``cols`` columns, or None."""
        length = self.size * max(self.outer, 1)
        if self.kind is TransformKind.KRONECKER and length != cols:
            return f"{self} acts on {length} columns, not on {cols}"
        if self.size and cols % self.size:
            return f"{self} needs a width that is a multiple of {self.size}, got {cols}"
        return None

    def part_specs(self, cols: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every part.

        Raises:
            ShapeError: a width that the transform cannot act on.
        """
        problem = self.refusal(cols)
        if problem is not None:
            raise ShapeError(problem)
        match self.kind:
            case TransformKind.SCALE:
                return {"scale": ((cols,), torch.float32)}
            case TransformKind.PERMUTE:
                return {"order": ((cols,), torch.int32)}
            case TransformKind.HADAMARD:
                return {}
            case TransformKind.BLOCK:
                count = 1 if self.is_shared else cols // self.size
                return {"matrix": ((count, self.size, self.size), torch.float32)}
            case TransformKind.KRONECKER:
                return {
                    "left": ((self.outer, self.outer), torch.float32),
                    "right": ((self.size, self.size), torch.float32),
                }

    def num_bytes(self, cols: int) -> int:
        """Return the bytes of all parts.

        Raises:
            ShapeError: a width that the transform cannot act on.
        """
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.part_specs(cols).values())


_SPEC = re.compile(r"(scale|permute|hadamard|block|kronecker)(?:\(([0-9a-z, ]+)\))?$")


def parse_transform(text: str) -> TransformSpec:
    """Return the transform that a spec stands for.

    Raises:
        FormatError: an unknown word or arguments that it does not take.
    """
    match = _SPEC.match(text.strip())
    words = [word.strip() for word in match[2].split(",")] if match and match[2] else []
    is_shared = words[1:] == ["shared"]
    numbers = words[:1] if is_shared else words
    if match is None or not all(word.isdecimal() for word in numbers):
        raise FormatError(
            f"transform {text!r} must be scale, permute, hadamard(B), block(B), block(B,shared) or kronecker(A,B)"
        )
    kind = TransformKind(match[1])
    expected = {TransformKind.HADAMARD: 1, TransformKind.BLOCK: 1, TransformKind.KRONECKER: 2}.get(kind, 0)
    if len(numbers) != expected:
        raise FormatError(f"transform {text!r}: {kind.value} takes {counted(expected, 'number')}, got {len(numbers)}")
    sizes = [int(word) for word in numbers]
    return TransformSpec(
        kind=kind,
        size=sizes[-1] if sizes else 0,
        outer=sizes[0] if kind is TransformKind.KRONECKER else 0,
        is_shared=is_shared,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Transform:
    """A transform of ``cols`` columns with its numbers.

    Raises:
        ShapeError: a part that is missing, unknown, or of another shape or dtype than the spec asks for.
    """

    spec: TransformSpec
    cols: int
    parts: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        specs = self.spec.part_specs(self.cols)
        found = {name: (tuple(part.shape), part.dtype) for name, part in self.parts.items()}
        if found != specs:
            raise ShapeError(f"transform {self.spec} of {self.cols} columns has the parts {specs}, got {found}")

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())


def scale_transform(scale: Tensor) -> Transform:
    """Return x'[i] = x[i] * scale[i]."""
    spec = TransformSpec(kind=TransformKind.SCALE)
    return Transform(spec=spec, cols=scale.numel(), parts={"scale": scale.to(torch.float32).contiguous()})


def permute_transform(order: Tensor) -> Transform:
    """Return x'[i] = x[order[i]].

    Raises:
        ShapeError: ``order`` is no permutation.
    """
    if not torch.equal(order.sort().values.cpu().to(torch.int64), torch.arange(order.numel())):
        raise ShapeError(f"an order of {order.numel()} columns must name each of them once")
    spec = TransformSpec(kind=TransformKind.PERMUTE)
    return Transform(spec=spec, cols=order.numel(), parts={"order": order.to(torch.int32).contiguous()})


def hadamard_transform(cols: int, size: int) -> Transform:
    """Return the block Hadamard transform."""
    return Transform(spec=TransformSpec(kind=TransformKind.HADAMARD, size=size), cols=cols, parts={})


def block_transform(matrix: Tensor, cols: int) -> Transform:
    """Return the block transform of ``matrix`` [blocks or 1, b, b]; one matrix for several blocks is shared."""
    size = matrix.shape[-1]
    is_shared = matrix.shape[0] == 1 and cols > size
    spec = TransformSpec(kind=TransformKind.BLOCK, size=size, is_shared=is_shared)
    return Transform(spec=spec, cols=cols, parts={"matrix": matrix.to(torch.float32).contiguous()})


def kronecker_transform(left: Tensor, right: Tensor) -> Transform:
    """Return x' = left^T x right, x as [a, b]."""
    spec = TransformSpec(kind=TransformKind.KRONECKER, size=right.shape[0], outer=left.shape[0])
    parts = {"left": left.to(torch.float32).contiguous(), "right": right.to(torch.float32).contiguous()}
    return Transform(spec=spec, cols=left.shape[0] * right.shape[0], parts=parts)
