"""A method as a chain of steps, from its words: ``hadamard:size=32+gptq:damp=0.01``, or a name such as ``mr-gptq``.

Words become a :class:`Method` once; with an effort and a format it gives its :class:`Pipeline`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from microscale.algorithms.contract import (
    BlockStep,
    FoldStep,
    FormatStep,
    ModelStep,
    RefineStep,
    RotationStep,
    RoundStep,
    SegmentStep,
    SideStep,
    Step,
    TransformStep,
)
from microscale.algorithms.registry import (
    AUTO,
    BEST,
    EFFORTS,
    FINE_EFFORTS,
    FOLDED_EFFORTS,
    METHODS,
    PLAIN,
    STEPS,
)
from microscale.errors import RecipeError, nearest
from microscale.formats import ActivationSpec, BlockFormat, Format, format_name, list_items
from microscale.transforms import AtRunTime

ORDER = (
    FormatStep,
    RotationStep,
    FoldStep,
    ModelStep,
    TransformStep,
    SegmentStep,
    BlockStep,
    RoundStep,
    RefineStep,
    SideStep,
)

SEGMENTED_ORDER = (FormatStep, RotationStep, FoldStep, TransformStep, SegmentStep, ModelStep, *ORDER[6:])
"""The order of a chain with segments: what learns end to end must know them."""

KindT = TypeVar("KindT", bound=Step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The steps of a method in order, one of which rounds."""

    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        """The chain in full, as :func:`parse_method` reads it."""
        return "+".join(step.text for step in self.steps)

    def of_kind(self, kind: type[KindT]) -> tuple[KindT, ...]:
        """Return the steps of one kind."""
        return tuple(step for step in self.steps if isinstance(step, kind))

    @property
    def rounding(self) -> RoundStep:
        """The one step that rounds."""
        return self.of_kind(RoundStep)[0]

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration text is needed."""
        return self.sees_whole or self.is_streamed

    @property
    def sees_whole(self) -> bool:
        """Whether a step runs the whole model at once, to learn from what it gives."""
        return self.is_end_to_end or any(step.is_learned for step in self.of_kind(RotationStep))

    @property
    def is_end_to_end(self) -> bool:
        """Whether a step learns from the whole model."""
        return bool(self.of_kind(ModelStep) or self.of_kind(RefineStep))

    @property
    def is_streamed(self) -> bool:
        """Whether the chain sees the inputs of the layers, one decoder layer after the other."""
        return any(isinstance(step, BlockStep) or step.wanted is not None for step in self.steps)

    @property
    def is_found_ahead(self) -> bool:
        """Whether folds and segments are found on the unquantized model, for a step that then learns end to end."""
        return bool(self.of_kind(ModelStep)) and bool(self.of_kind(FoldStep) or self.of_kind(SegmentStep))

    @property
    def is_fed(self) -> bool:
        """Whether the chain sees inputs while layers are rounded, be it beside what it found ahead."""
        found = (FoldStep, TransformStep, SegmentStep) if self.is_found_ahead else ()
        left = [step for step in self.steps if not isinstance(step, found)]
        return any(isinstance(step, BlockStep) or step.wanted is not None for step in left)

    @property
    def is_online(self) -> bool:
        """Whether a layer keeps a transform or a side path for run time (folds that find no place do so besides)."""
        return any(step.is_online for step in self.steps)

    def adapt(self, fmt: Format, activations: ActivationSpec | None) -> tuple[Format, ActivationSpec | None]:
        """Return the formats that the chain uses in place of those asked for."""
        for step in self.of_kind(FormatStep):
            fmt, activations = step.adapt(fmt, activations)
        return fmt, activations

    def refusal(self, fmt: Format, activations: ActivationSpec | None) -> str | None:
        """Return why the chain cannot serve a layer of these formats, or None."""
        for step in self.steps:
            problem = step.refusal(fmt, activations)
            if problem is not None:
                return f"step {step.name} cannot quantize to {format_name(fmt)}: {problem}"
        return None

    def idleness(self, fmt: Format, activations: ActivationSpec | None) -> list[str]:
        """Return which steps change nothing for a layer of these formats, and why."""
        idle: list[str] = []
        for step in self.steps:
            reason = step.idleness(fmt, activations)
            if reason is not None:
                idle.append(f"step {step.name} changes nothing for {format_name(fmt)}: {reason}")
            if isinstance(step, FormatStep):
                fmt, activations = step.adapt(fmt, activations)
        return idle


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method as it was asked for: its words and its steps, None where ``best`` stands.

    Raises:
        RecipeError: steps in an order that makes no sense.
    """

    text: str
    steps: tuple[Step | None, ...]

    def __post_init__(self) -> None:
        self.pipeline()

    def __str__(self) -> str:
        return self.text

    @property
    def takes_effort(self) -> bool:
        """Whether an effort chooses steps of it."""
        return None in self.steps

    def pipeline(
        self, *, effort: str = "fast", fmt: Format | None = None, at_run_time: AtRunTime = AtRunTime.ONLINE
    ) -> Pipeline:
        """Return the chain; effort, the weights' format and what may stay at run time choose that of ``best``.

        Raises:
            RecipeError: an unknown effort, or a chain of ``best`` that does not fit in.
        """
        if effort not in EFFORTS:
            raise RecipeError(
                f"unknown effort {effort!r}{nearest(effort, EFFORTS) or ';'} possible: {', '.join(EFFORTS)}"
            )
        steps = [step for own in self.steps for step in (_best(effort, fmt, at_run_time) if own is None else (own,))]
        return make_pipeline(steps, self.text)


def read_method(given: str | Pipeline | Method) -> Method:
    """Return the method that words or a chain stand for; a method passes through.

    Raises:
        RecipeError: an unknown step or option, a value of the wrong kind, or steps in an order that makes no sense.
    """
    if isinstance(given, Method):
        return given
    if isinstance(given, Pipeline):
        return Method(text=given.text, steps=given.steps)
    chain = METHODS.get(given.strip(), given)
    words = [word.strip() for word in chain.split("+")]
    steps = [step for word in words for step in ((None,) if word == BEST else _parse_word(word))]
    return Method(text=given, steps=tuple(steps))


def parse_method(text: str, *, effort: str = "fast", fmt: Format | None = None) -> Pipeline:
    """Return the chain that a method's words stand for; see :class:`Method` for ``effort`` and ``fmt``.

    Raises:
        RecipeError: see :func:`read_method` and :meth:`Method.pipeline`.
    """
    return read_method(text).pipeline(effort=effort, fmt=fmt)


def make_pipeline(steps: Sequence[Step], asked: str = "") -> Pipeline:
    """Return the chain of steps; plain rounding is added where none rounds. ``asked`` are the words of a refusal.

    Raises:
        RecipeError: steps in an order that makes no sense.
    """
    steps = list(steps)
    if not any(isinstance(step, RoundStep) for step in steps):
        first_side = next((i for i, step in enumerate(steps) if isinstance(step, RefineStep | SideStep)), len(steps))
        steps.insert(first_side, PLAIN)
    _check_order(asked or "+".join(step.text for step in steps), steps)
    return Pipeline(steps=tuple(steps))


def with_budget(method: Method, bits: float) -> Pipeline:
    """Return a method's chain with ``bits`` as the budget of the step that has one.

    Raises:
        RecipeError: no step of the chain has a budget, or the one that has is given another already.
    """
    pipeline = method.pipeline()
    spending = next((step for step in pipeline.steps if step.has_budget), None)
    if spending is None:
        *words, last = (AUTO, *(word for word in METHODS if any(step.has_budget for step in _parse_word(word))))
        raise RecipeError(
            f"method {method} has no budget, so {bits:g} bits say nothing to it; {', '.join(words)} and {last} have one"
        )
    if spending.budget not in (None, bits):
        raise RecipeError(f"method {method} has bits={spending.budget:g} already; leave one of the two budgets out")
    given = spending.with_budget(bits)
    return Pipeline(steps=tuple(given if step is spending else step for step in pipeline.steps))


def beside_segments(own: Pipeline, common: Pipeline) -> Pipeline:
    """Return a chain that cuts segments with those steps of another one that may stand beside them.

    Changes of formats and folds are taken over where ``own`` has none, the rounding where ``own`` rounds plainly.
    Without segments ``own`` is all.
    """
    if not own.of_kind(SegmentStep):
        return own
    places = {_place(step, SEGMENTED_ORDER) for step in own.steps}
    is_plain = own.rounding == PLAIN
    kept = [step for step in own.steps if not (is_plain and isinstance(step, RoundStep))]
    for step in common.steps:
        is_new = _place(step, SEGMENTED_ORDER) not in places or (isinstance(step, RoundStep) and is_plain)
        if is_new and step.segment_obstacle is None and (is_plain or step.next_step is None):
            kept.append(step)
    kept.sort(key=lambda step: _place(step, SEGMENTED_ORDER))
    return make_pipeline(kept)


def _best(effort: str, fmt: Format | None, at_run_time: AtRunTime) -> tuple[Step, ...]:
    if isinstance(fmt, BlockFormat) and not fmt.scale.is_power_of_two:
        return _parse_steps(FINE_EFFORTS[effort])
    return _parse_steps((EFFORTS if at_run_time is AtRunTime.ONLINE else FOLDED_EFFORTS)[effort])


def _parse_word(word: str) -> tuple[Step, ...]:
    """Return the steps of a word of a chain: those of a named chain, or one."""
    return _parse_steps(word if word in STEPS else METHODS.get(word, word))


@functools.cache
def _parse_steps(chain: str) -> tuple[Step, ...]:
    return tuple(map(_parse_step, chain.split("+")))


def _parse_step(text: str) -> Step:
    word, _, rest = text.partition(":")
    kind = STEPS.get(word)
    if word == AUTO:
        raise RecipeError(
            "auto is no step of a chain: it finds the formats of all layers under a budget (microscale quantize MODEL"
            " --method auto --bits 4.5, or auto+gptq with another method to round by)"
        )
    if kind is None:
        hint = nearest(word, (AUTO, BEST, *METHODS, *STEPS)) or ";"
        raise RecipeError(
            f"unknown method or step {word!r}{hint} methods: {BEST}, {', '.join(METHODS)}; steps: {', '.join(STEPS)}"
        )
    options: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for item in list_items(rest):
        name, equals, value = item.partition("=")
        if name not in fields or not equals:
            known = ", ".join(f"{field.name}={field.default}" for field in fields.values()) or "none"
            raise RecipeError(f"step {word}: {item!r} is no option of it; options and defaults: {known}")
        options[name] = _value(word, name, value, fields[name].default)
    return kind(**options)


def _value(step: str, name: str, text: str, default: object) -> object:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if isinstance(default, int):
            return int(text)
        return float(text) if isinstance(default, float) else text
    except (KeyError, ValueError):
        wanted = "true or false" if isinstance(default, bool) else f"a number like {default}"
        raise RecipeError(f"step {step}: {name} must be {wanted}, got {text!r}") from None


def _place(step: Step, order: Sequence[type[Step]]) -> int:
    return next(place for place, kind in enumerate(order) if isinstance(step, kind))


def _check_order(text: str, steps: list[Step]) -> None:
    segmenting = next((step for step in steps if isinstance(step, SegmentStep)), None)
    for step in steps:
        if segmenting is not None and step.segment_obstacle is not None:
            raise RecipeError(
                f"method {text!r}: {step.name} cannot stand beside {segmenting.name}, for {step.segment_obstacle};"
                f" {segmenting.companions}"
            )
    order = ORDER if segmenting is None else SEGMENTED_ORDER
    places = [_place(step, order) for step in steps]
    if places != sorted(places):
        names = " then ".join(step.name for step in sorted(steps, key=lambda s: places[steps.index(s)]))
        raise RecipeError(f"method {text!r}: its steps must come in the order {names}")
    if sum(isinstance(step, RoundStep) for step in steps) != 1:
        rounding = ", ".join(step.name for step in steps if isinstance(step, RoundStep))
        raise RecipeError(f"method {text!r} rounds more than once ({rounding}); keep one of these steps")
    refining, sides = (next((s for s in steps if isinstance(s, kind)), None) for kind in (RefineStep, SideStep))
    if refining is not None and sides is not None:
        raise RecipeError(
            f"method {text!r}: {sides.name} makes up for a rounding that {refining.name} changes; keep one of the two"
        )
    for step, after in itertools.pairwise(steps):
        if step.next_step not in (None, after.name):
            raise RecipeError(f"method {text!r}: {step.next_step} must follow {step.name}, not {after.name}")
