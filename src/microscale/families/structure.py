"""What is known about the layers of one model: which linears read one input, and into what a scale can be folded.

Records only: :func:`microscale.families.look_up.describe` makes them, recipes/folding.py acts on them. Names of a
block's parts are relative to the block, those in :class:`ModelStructure` are full.

A *matrix* is named like a parameter: the weight of a linear layer, of a router, or a stack of experts [experts, out,
in]. All of them take x on their last axis (Conv1D: on the first).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class FoldKind(Enum):
    """Into what the inverse of an input scale goes.

    NORM: the weight (and bias) of a norm. LINEAR: rows of the preceding linear layer (up_proj before down_proj, fc1
    before a ReLU and fc2). VALUE: rows of the value projection before the output projection of attention; one scale for
    each channel of a key-value head, shared by the query heads that read it.
    """

    NORM = "norm"
    LINEAR = "linear"
    VALUE = "value"


class Signs(Enum):
    """Which scales leave the function unchanged: any but zero, or positive ones alone (a ReLU lies between)."""

    ANY = "any"
    POSITIVE = "positive"


class NormKind(Enum):
    """RMS: x / rms(x) * w. RMS_PLUS_ONE: x / rms(x) * (1 + w), as in Gemma. LAYER: LayerNorm, with mean and bias."""

    RMS = "rms"
    RMS_PLUS_ONE = "rms_plus_one"
    LAYER = "layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows of a weight, in ``heads`` runs of ``width``: the run h starts at ``start + h * stride``."""

    start: int
    heads: int
    stride: int
    width: int

    @property
    def indices(self) -> tuple[int, ...]:
        """The rows one by one."""
        starts = (self.start + head * self.stride for head in range(self.heads))
        return tuple(row for start in starts for row in range(start, start + self.width))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Where the input of a group comes from, and all that reads it.

    ``name`` is the module that takes the inverse of an input scale. ``readers`` are all matrices whose input the scale
    changes: those of the group, and any others that read the same (a router, other experts), so that groups with one
    ``name`` share one scale. ``rows`` are the rows of ``name`` that make the input (None for a norm: all of it), and
    ``shared_by`` is how many query heads read each run of them. ``norm`` says what a norm does with its weight.
    """

    kind: FoldKind
    name: str
    readers: tuple[str, ...]
    rows: Rows | None = None
    shared_by: int = 1
    signs: Signs = Signs.ANY
    norm: NormKind | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearGroup:
    """Linear layers of one block that read the very same input, in order of execution.

    ``role`` says what they are for: attention.qkv, attention.out, mlp.gate_up, mlp.down, moe.experts.gate_up and so on;
    roles that end in ``.out`` or ``.down`` write into the residual stream. Each expert has groups of its own, for it
    sees tokens of its own.

    ``sources`` are the linear layers whose outputs make the group's input number by number (activation functions,
    products), and are read by nothing else: an order of the channels can go into their rows. One whose outputs are k
    times as wide as the input (gate and up in one matrix) has k runs of rows, and the order goes into each.
    """

    role: str
    linears: tuple[str, ...]
    fold: Fold | None = None
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NormReaders:
    """A norm of the residual stream and all matrices that read its output."""

    name: str
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStructure:
    """One layer of a model: its full name, and groups in order of execution that name every linear of it once.

    ``norms`` read the residual stream, and ``writers`` are the matrices whose output is added to it.
    """

    name: str
    groups: tuple[LinearGroup, ...]
    norms: tuple[NormReaders, ...] = ()
    writers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStructure:
    """A model, or the part of it that was asked for.

    ``embeddings`` are the token embeddings. ``entries`` are all matrices that write into the residual stream before the
    first block. ``rotation_obstacle`` says why the residual stream cannot be rotated (None: it can).
    """

    family: str
    is_known: bool
    blocks: tuple[BlockStructure, ...]
    embeddings: tuple[str, ...]
    final_norm: str | None
    head: str | None
    part: str
    norm: NormKind | None = None
    entries: tuple[str, ...] = ()
    rotation_obstacle: str | None = None

    def block(self, name: str) -> BlockStructure:
        """Return a block by its full name.

        Raises:
            KeyError: there is none.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(name)
