"""What every method gets and gives: records of layers and groups, and one base class for each kind of step.

A method is a chain of steps. Each step is a frozen record of its options with one pure function; it never changes its
input. The kinds, in the order in which a chain may hold them:

=============  ==============================================================================================
FormatStep     changes the formats themselves (the scale rule) before anything is measured
RotationStep   rotates the residual stream of the whole model, folded into its weights
FoldStep       finds a scale of a group's input, folded into what comes before or kept online
ModelStep      learns from the whole model, end to end
TransformStep  finds a transform of a group's input that stays online, and changes the weights to match
SegmentStep    sorts the channels of a group's input, and gives segments of them formats of their own
BlockStep      learns from the outputs of one decoder layer
RoundStep      turns a weight into a quantized tensor
RefineStep     goes on from the rounded model, end to end, and keeps what is better
SideStep       adds a side path that gives back some of what rounding took
=============  ==============================================================================================

In a chain with a SegmentStep, a ModelStep comes behind it: it learns the rounding of the segments.

A *group* is the linear layers that read the very same input; a fold or a transform is found for all of them together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.calibration.statistics import InputStatistics, Wanted
from microscale.families.batch import Batch
from microscale.formats import ActivationSpec, Format
from microscale.kernels.transform import apply_transforms, transform_second_moment, transform_weight
from microscale.tensor import QuantizedTensor
from microscale.transforms import Transform

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is at hand)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerProblem:
    """A linear layer to quantize.

    ``weight`` [rows, cols] is float32 and belongs to the inputs x as they come; ``target`` to the transformed inputs
    x' = x M of ``transforms``, and is what must be rounded. ``clip`` [rows, cols], where a method found one, bounds the
    magnitudes of ``target`` from which the scales are taken (numbers past it saturate). ``offset`` [rows, cols] is what
    a method that tunes the rounding itself adds to ``target`` once the scales are fixed; rounding to nearest heeds it.
    ``inputs`` are the statistics of x. ``stored`` is the packed weight that ``weight`` was expanded from, where there
    is one.
    """

    name: str
    weight: Float[Tensor, "rows cols"]
    format: Format
    activations: ActivationSpec | None
    dtype: torch.dtype
    transforms: tuple[Transform, ...] = ()
    clip: Float[Tensor, "rows cols"] | None = None
    offset: Float[Tensor, "rows cols"] | None = None
    inputs: InputStatistics | None = None
    stored: QuantizedTensor | None = None

    @property
    def target(self) -> Float[Tensor, "rows cols"]:
        """The weight of x', made anew at every access."""
        weight = self.weight
        for transform in self.transforms:
            weight = transform_weight(weight, transform)
        return weight

    @property
    def second_moment(self) -> Float[Tensor, "cols cols"] | None:
        """The second moment of x', or None where it was not measured or no token came by."""
        inputs = self.inputs
        if inputs is None or inputs.second_moment is None or inputs.num_tokens == 0:
            return None
        moment = inputs.second_moment
        for transform in self.transforms:
            moment = transform_second_moment(moment, transform)
        return moment

    def with_transforms(self, transforms: Sequence[Transform]) -> LayerProblem:
        """Return the problem with more transforms of its input."""
        return dataclasses.replace(self, transforms=(*self.transforms, *transforms), clip=None, offset=None)


def forget(note: object) -> None:
    """Tell nobody."""


def as_it_is(found: Tensor) -> Tensor:
    """Return what was found: any scale, or any rotation, can be taken."""
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupProblem:
    """Linear layers that read the very same input.

    ``is_order_folded``: an order of the channels, where a step finds one, goes into the layers that make the input, so
    that nothing of it is left at run time. ``share`` makes of a scale [cols] the one that the layers before can take:
    heads that share a value share its scale.
    """

    role: str
    layers: tuple[LayerProblem, ...]
    inputs: InputStatistics | None = None
    is_order_folded: bool = False
    share: Callable[[Float[Tensor, "cols"]], Float[Tensor, "cols"]] = as_it_is

    @property
    def cols(self) -> int:
        """Width of the input."""
        return self.layers[0].weight.shape[1]

    @property
    def sample(self) -> Float[Tensor, "tokens cols"]:
        """Rows of the input that the layers see, after the transforms."""
        assert self.inputs is not None and self.inputs.sample is not None
        return apply_transforms(self.inputs.sample, self.layers[0].transforms)


Formats = tuple[Format, ActivationSpec | None]
"""The formats of a layer's weight and of its inputs (None: not rounded)."""


def option_word(value: object) -> str:
    """Return the word that stands for the value of an option in a chain."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return (short if float(short) == value else repr(value)).replace("e+", "e")  # a + would end the step
    return str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Base of all steps: ``name`` is the word in a chain, ``source`` the paper."""

    name: ClassVar[str]
    source: ClassVar[str]
    has_budget: ClassVar[bool] = False
    """Whether the step spends a budget of bits for each weight; see :meth:`with_budget`."""
    next_step: ClassVar[str | None] = None
    """The word of the only step that may follow; None: any may."""

    @property
    def text(self) -> str:
        """The words of the step, with every option that is not the default."""
        values = [(field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self)]
        given = [f"{name}={option_word(value)}" for name, value, default in values if value != default]
        return f"{self.name}:{','.join(given)}" if given else self.name

    @property
    def budget(self) -> float | None:
        """The bits for each weight that it was told to spend, if any."""
        return None

    def with_budget(self, bits: float) -> Step:
        """Return the step with a budget; for steps that have one."""
        raise NotImplementedError

    @property
    def wanted(self) -> Wanted | None:
        """What must be measured of a group's inputs; None: nothing at all."""
        return None

    def windows_learned(self, count: int) -> float:
        """How many of ``count`` windows it learns from by a pass through the whole model, repeats counted."""
        return 0.0

    @property
    def is_online(self) -> bool:
        """Whether a layer keeps something of the step for run time, wherever it stands in the model."""
        return False

    @property
    def segment_obstacle(self) -> str | None:
        """Why the step cannot stand in a chain with segments, as the end of a sentence; None: it can."""
        return None

    def refusal(self, fmt: Format, activations: ActivationSpec | None) -> str | None:
        """Return why the step cannot serve a layer of these formats, or None."""
        return None

    def idleness(self, fmt: Format, activations: ActivationSpec | None) -> str | None:
        """Return why the step, or an option of it, changes nothing for a layer of these formats, or None."""
        return None

    def repeated(self, before: Formats, after: Formats) -> Step | None:
        """Return the step that makes of a layer what this one made of it, whatever is chosen for other layers.

        ``before`` and ``after`` are the layer's formats. None: it made nothing of it.
        """
        return self


class FormatStep(Step):
    """Changes the formats."""

    def adapt(self, fmt: Format, activations: ActivationSpec | None) -> Formats:
        """Return the formats to use instead; a format that the step does not concern comes back as it is."""
        raise NotImplementedError


class FoldStep(Step):
    """Finds s with x -> x / s and W -> W * s."""

    def input_scale(self, group: GroupProblem) -> Float[Tensor, "cols"]:
        """Return s, positive and finite, [cols]."""
        raise NotImplementedError


class TransformStep(Step):
    """Finds transforms that stay online."""

    @property
    def is_online(self) -> bool:
        """It stays online."""
        return True

    @property
    def segment_obstacle(self) -> str | None:
        """It moves channels or mixes them."""
        return "it mixes or moves channels (a rotation spreads outliers over all), so that their order is lost"

    def transforms(self, group: GroupProblem) -> tuple[Transform, ...]:
        """Return the transforms, to be appended to those that the group has."""
        raise NotImplementedError


class SegmentStep(Step):
    """Gives channels of a group's input formats of their own.

    It sorts the channels by a permutation, the last transform of the layers that it cuts. Where the group's
    ``is_order_folded`` says so, that order goes into the layers before and costs nothing; else it stays online.
    """

    companions: ClassVar[str] = ""
    """What may stand in a chain with it, as advice for one who put something else there."""

    @property
    def is_online(self) -> bool:
        """The order of the channels stays online in most layers."""
        return True

    def segmented(self, group: GroupProblem) -> GroupProblem:
        """Return the group with layers whose formats are segments, and the permutation among their transforms."""
        raise NotImplementedError


class RoundStep(Step):
    """Quantizes one weight."""

    def quantize(self, layer: LayerProblem) -> QuantizedTensor:
        """Return the quantized weight of x'."""
        raise NotImplementedError


class SideStep(Step):
    """Adds a low-rank side path."""

    @property
    def is_online(self) -> bool:
        """It stays online."""
        return True

    def side(self, layer: LayerProblem, tensor: QuantizedTensor) -> tuple[Tensor, Tensor]:
        """Return (down [rank, cols], up [rows, rank]) with up @ down near weight - dequantize(tensor)."""
        raise NotImplementedError


LayerFunction = Callable[[Tensor], Tensor]
"""A stand-in for a linear layer: its input [..., cols] to its output [..., rows]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockProblem:
    """One decoder layer as a function to learn from.

    ``forward(stand_ins, batch)`` runs the layer on the cached inputs of a batch, with some of its linear layers (by the
    names of the problems) replaced by functions of their input, and passes gradients. ``targets[batch]`` is what the
    unquantized model gives; ``biases`` are the layers' own.
    """

    groups: tuple[GroupProblem, ...]
    forward: Callable[[Mapping[str, LayerFunction], int], Tensor]
    targets: Sequence[Tensor]
    biases: Mapping[str, Tensor | None]
    seed: int
    progress: Progress


class BlockStep(Step):
    """Learns from a decoder layer."""

    @property
    def is_online(self) -> bool:
        """It stays online."""
        return True

    @property
    def segment_obstacle(self) -> str | None:
        """What it learns is a transform."""
        return "it learns transforms and clips for the blocks of one format, not for those of segments"

    def learn(self, problem: BlockProblem) -> tuple[GroupProblem, ...]:
        """Return the groups with new weights, transforms or clips."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelProblem:
    """The whole model as a function to learn from.

    ``logits(stand_ins, batch)`` runs the model with stand-ins for some linear layers (none: the unquantized model).
    ``tell`` takes what a user should know of the outcome.
    """

    groups: tuple[GroupProblem, ...]
    logits: Callable[[Mapping[str, LayerFunction], Batch], Float[Tensor, "batch tokens words"]]
    windows: Batch
    biases: Mapping[str, Tensor | None]
    seed: int
    progress: Progress
    tell: Callable[[str], None] = forget


class ModelStep(Step):
    """Learns from the whole model."""

    def learn(self, problem: ModelProblem) -> tuple[GroupProblem, ...]:
        """Return the groups with new weights, transforms or clips."""
        raise NotImplementedError


class RefineStep(Step):
    """Goes on from a model that is rounded."""

    def refine(self, problem: ModelProblem, rounded: Mapping[str, LayerFunction]) -> tuple[GroupProblem, ...] | None:
        """Return the groups with new weights, to be rounded to nearest; None where ``rounded`` is no worse.

        ``rounded`` is what the layers compute as they are rounded now, those of other chains included.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RotationProblem:
    """A residual stream of ``size`` to rotate.

    ``readers`` and ``writers`` are the names of the linear layers that read the stream (behind norms whose weights have
    been moved into them) and add to it. ``admissible`` makes of a rotation the one that the model will get: where
    ``keeps_mean``, that is one that maps the vector of ones to itself. ``model`` is there for steps that learn.
    """

    size: int
    readers: frozenset[str]
    writers: frozenset[str]
    keeps_mean: bool
    admissible: Callable[[Float[Tensor, "size size"]], Float[Tensor, "size size"]]
    model: ModelProblem | None


class RotationStep(Step):
    """Rotates the residual stream of the whole model, folded into its weights before anything is measured."""

    is_learned: ClassVar[bool] = False
    """Whether it needs calibration text."""
    is_dispensable: ClassVar[bool] = False
    """Whether a model whose residual stream cannot be rotated is quantized without it, with a note."""

    def crosses(self, block_size: int) -> bool:
        """Whether it mixes channels of different blocks."""
        return True

    @property
    def segment_obstacle(self) -> str | None:
        """It mixes all channels."""
        return "it spreads the outlier channels over all others, so that none is left that needs more bits"

    def rotation(self, problem: RotationProblem) -> Float[Tensor, "size size"]:
        """Return an orthogonal matrix."""
        raise NotImplementedError

    def head_rotation(self, size: int, index: int) -> Float[Tensor, "size size"] | None:
        """Return an orthogonal matrix for the values of each head of block ``index``; None leaves them alone."""
        raise NotImplementedError


def clipped(target: Float[Tensor, "rows cols"], layer: LayerProblem) -> Float[Tensor, "rows cols"]:
    """Return the target from which scales are taken: clipped, where the layer has a clip."""
    return target if layer.clip is None else torch.clamp(target, -layer.clip, layer.clip)
