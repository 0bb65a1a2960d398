"""Look at a model's numbers layer by layer: what they are like, what each candidate format makes of them, what suits.

The decoder layers run one after the other on the inputs of the unquantized model, in float32; besides one layer and the
hidden states of the text nothing is kept, and with a source of layers no more than that is ever read. Errors are
measured on a sample of ``SAMPLE_ROWS`` evenly chosen tokens, and of the head and embeddings on ``MAX_ROWS`` rows.

The inputs of norms and of the head are described too: those of norms are the residual stream, where massive activations
live. Gradients (:mod:`microscale.planning.gradients`) are measured where there is a store for what they need.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from microscale.algorithms.contract import Progress
from microscale.calibration.cache import ActivationStore
from microscale.errors import CalibrationError, ModelError
from microscale.families.batch import Batch
from microscale.families.look_up import describe
from microscale.families.modules import is_transposed
from microscale.families.parts import is_inside
from microscale.families.running import run_model
from microscale.families.structure import BlockStructure, LinearGroup
from microscale.layerwise.blocks import BlockRunner, FoundError, removed_after, replaced_forward
from microscale.layerwise.devices import on_device
from microscale.layerwise.loader import LayerLoader, LayerSource
from microscale.nn.modules import float_weight
from microscale.nn.packed import PackedModule
from microscale.planning.candidates import Candidate
from microscale.planning.gradients import measure_gradients
from microscale.planning.layer_facts import (
    ClassHistogram,
    LayerAnalysis,
    Side,
    TensorClasses,
    candidate_errors,
    gradient_qsnr,
)
from microscale.planning.recommendation import DEFAULT_TARGET_DB, Recommendation
from microscale.planning.tensor_facts import TensorObserver, weight_facts
from microscale.recipes.calibration import Calibration
from microscale.recipes.plan import quantizable_modules

MAX_ROWS = 1024
"""Rows of an embedding or a head on which errors are measured: a vocabulary would be the largest tensor of the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A candidate over all linear layers of the decoder layers: bits per weight, geometric mean of output errors."""

    candidate: str
    bits: float
    output_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAnalysis:
    """All that was found."""

    layers: tuple[LayerAnalysis, ...]
    curve: tuple[CurvePoint, ...]
    recommendations: tuple[Recommendation, ...]
    histograms: tuple[ClassHistogram, ...]
    num_tokens: int


@dataclass(slots=True, kw_only=True)
class _Job:
    """What an analysis works with, and what it has found so far."""

    model: Any
    candidates: Sequence[Candidate]
    classes: TensorClasses = field(default_factory=TensorClasses)
    found: dict[str, LayerAnalysis] = field(default_factory=dict[str, LayerAnalysis])


@torch.no_grad()
def analyze_model(
    model: Any,
    candidates: Sequence[Candidate],
    calibration: Calibration,
    *,
    source: LayerSource | None = None,
    gradients: ActivationStore | None = None,
    target_db: float = DEFAULT_TARGET_DB,
    progress: Progress,
    device: torch.device | None = None,
) -> ModelAnalysis:
    """Analyze a model; it stays as it is.

    ``source`` reads the decoder layers of a model that was built without them. ``gradients`` asks for gradients too:
    it keeps what each layer gets until the backward pass comes by, in memory or on disk. ``device`` is where decoder
    layers are worked on, one at a time (None: where the model lies).

    Raises:
        ModelError: the model is quantized already, or its layers cannot be run one by one.
        NonFiniteError: NaN or Inf in a weight, in the inputs of a layer or in a gradient, with its name.
        CalibrationError: gradients of windows of a single token, which predict nothing.
    """
    if any(isinstance(module, PackedModule) for module in model.modules()):
        raise ModelError("the model is quantized already; analyze the original")
    if gradients is not None and calibration.windows.shape[1] < 2:
        raise CalibrationError("gradients need windows of at least two tokens; raise --window")
    blocks = describe(model).blocks
    names = [block.name for block in blocks]
    loader = LayerLoader(model, source)
    job = _Job(model=model, candidates=candidates)
    steps = _Steps(progress, len(names) + 1 + (0 if gradients is None else len(names) + 2))
    with loader.stored(names[0]):
        runner = BlockRunner(model, names, calibration.samples, batch=1, device=device)
    hidden = list(runner.embedded())
    for index, block in enumerate(blocks):
        steps.advance(block.name)
        if gradients is not None:
            _keep(gradients, index, hidden)
        with loader.layer(block.name) as module, on_device(module, device):
            observed = _run_block(runner, index, module, block, hidden)
            for group in block.groups:
                _describe_group(job, block.name, module, group, observed[group.linears[0]])
            _describe_rest(job, block.name, module, observed)
    steps.advance("embeddings and head")
    if gradients is not None:
        _keep(gradients, len(names), hidden)
    outside = _run_ends(job, names, calibration.samples, hidden, runner)
    hidden.clear()
    _describe_rest(job, "", model, outside, apart=names)
    if gradients is not None:
        visit = _gradient_visitor(job, names)
        measure_gradients(loader, blocks, calibration.samples, runner, gradients, visit, steps.advance)
    return _summary(job, calibration.windows.numel(), target_db, progress)


class _Steps:
    """Counts steps for a progress bar."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def advance(self, label: str) -> None:
        """Begin the next step."""
        self._progress(self._done, self._total, label)
        self._done += 1


def _keep(store: ActivationStore, layer: int, hidden: Sequence[Tensor]) -> None:
    for place, batch in enumerate(hidden):
        store.put(layer, place, batch.contiguous())
    store.finish_layer(layer)


def _run_block(
    runner: BlockRunner, index: int, module: nn.Module, block: BlockStructure, hidden: list[Tensor]
) -> dict[str, TensorObserver]:
    """Run a decoder layer over all windows, in place of its inputs, and observe what its groups and norms get."""
    names = [group.linears[0] for group in block.groups] + _vector_owners(module)
    observers: dict[str, TensorObserver] = {}
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(names):
            part, observers[name] = _observed(module, name, f"{block.name}.{name}")
            stack.enter_context(part)
        for place, batch in enumerate(hidden):
            hidden[place] = runner.run(index, batch, batch=place).to(runner.home)
    return observers


def _observed(module: nn.Module, name: str, label: str) -> tuple[Any, TensorObserver]:
    """Return an observer of what a part of a module gets, and the context in which it does."""
    part = module.get_submodule(name)
    weight = part.get_parameter("weight")
    cols = weight.shape[0] if weight.ndim == 1 or is_transposed(part) else weight.shape[1]
    observer = TensorObserver(cols, label, weight.device)

    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor) and arguments[0].shape[-1] == cols:
            observer.update(arguments[0])

    return removed_after(part.register_forward_pre_hook(hook)), observer


def _vector_owners(module: nn.Module, apart: Sequence[str] = ()) -> list[str]:
    """Return the modules whose weight is a vector: norms."""
    return [
        name.rpartition(".")[0]
        for name, parameter in module.named_parameters()
        if name.endswith(".weight") and parameter.ndim == 1 and not is_inside(name, apart)
    ]


def _describe_group(job: _Job, block: str, module: nn.Module, group: LinearGroup, observer: TensorObserver) -> None:
    """Describe linear layers that read one input, and that input."""
    sample = observer.sample()
    facts = None if observer.is_empty else observer.facts()
    if facts is not None:
        job.classes.add(group.role, Side.INPUTS, sample, facts)
    for name in group.linears:
        weight = float_weight(module.get_submodule(name))
        own = weight_facts(weight, f"{block}.{name}.weight")
        job.classes.add(group.role, Side.WEIGHTS, weight, own)
        job.found[f"{block}.{name}"] = LayerAnalysis(
            name=f"{block}.{name}",
            role=group.role,
            shape=tuple(weight.shape),
            weight=own,
            inputs=facts,
            errors=candidate_errors(weight, sample, job.candidates),
        )


def _describe_rest(
    job: _Job, prefix: str, module: nn.Module, observed: Mapping[str, TensorObserver], apart: Sequence[str] = ()
) -> None:
    """Describe what is in no group: embeddings, the head, other linear layers, norms; with inputs where observed."""
    head = job.model.get_output_embeddings() if hasattr(job.model, "get_output_embeddings") else None
    parts = quantizable_modules(module)
    for name, part in module.named_modules():  # those that scale what they give cannot be replaced, but described
        if isinstance(part, nn.Embedding):
            parts.setdefault(name, ("embedding", part))
    for name, (kind, part) in parts.items():
        full = f"{prefix}.{name}" if prefix else name
        if full in job.found or is_inside(name, apart):
            continue
        weight = _raw_weight(part)
        own = weight_facts(weight, f"{full}.weight")
        role = "embedding" if kind == "embedding" else "lm_head" if part is head else "other"
        job.classes.add(role, Side.WEIGHTS, weight, own)
        observer = observed.get(name)
        facts = sample = None
        if observer is not None and not observer.is_empty:
            facts, sample = observer.facts(), observer.sample()
            job.classes.add(role, Side.INPUTS, sample, facts)
        some = weight[:: max(1, weight.shape[0] // MAX_ROWS)][:MAX_ROWS].to(torch.float32).contiguous()
        errors = candidate_errors(some, sample, job.candidates)
        job.found[full] = LayerAnalysis(
            name=full, role=role, shape=tuple(weight.shape), weight=own, inputs=facts, errors=errors
        )
    for name in _vector_owners(module, apart):
        full = f"{prefix}.{name}" if prefix else name
        weight = module.get_submodule(name).get_parameter("weight").detach()
        own = weight_facts(weight.to(torch.float32), f"{full}.weight")
        facts = observed[name].facts() if name in observed and not observed[name].is_empty else None
        job.found[full] = LayerAnalysis(
            name=full, role="norm", shape=tuple(weight.shape), weight=own, inputs=facts, errors={}
        )


def _raw_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight [out, in] in its own dtype, for one of a vocabulary is too large to be widened."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight


def _run_ends(
    job: _Job, names: Sequence[str], windows: Batch, hidden: list[Tensor], runner: BlockRunner
) -> dict[str, TensorObserver]:
    """Observe what the norms outside of the decoder layers and the head get, in the model's own dtype."""
    head = job.model.get_output_embeddings() if hasattr(job.model, "get_output_embeddings") else None
    observers: dict[str, TensorObserver] = {}
    with contextlib.ExitStack() as stack:
        wanted = _vector_owners(job.model, names)
        wanted += [name for name, module in job.model.named_modules() if module is head and not is_inside(name, names)]
        for name in wanted:
            part, observers[name] = _observed(job.model, name, name)
            stack.enter_context(part)
        if head is not None:

            def stop(*_: Any) -> None:
                raise FoundError  # the logits would be the largest tensor of the job

            stack.enter_context(removed_after(head.register_forward_pre_hook(stop)))
        dtype = job.model.get_input_embeddings().weight.dtype
        for place, window in enumerate(windows.split(1)):
            give = runner.returned.stand_in(hidden[place].to(dtype))
            with replaced_forward(dict.fromkeys(names, give), job.model), contextlib.suppress(FoundError):
                run_model(job.model, window.to(runner.home))
    return observers


def _gradient_visitor(job: _Job, names: Sequence[str]) -> Callable[..., None]:
    """Return what takes in the gradients of a decoder layer, or ("") of all that lies outside of them."""

    def visit(prefix: str, module: nn.Module, outputs: Mapping[str, TensorObserver]) -> None:
        for name, observer in outputs.items():
            _add_output_gradients(job, f"{prefix}.{name}", observer)
        for full, layer in list(job.found.items()):
            if is_inside(full, (prefix,) if prefix else names) != bool(prefix):
                continue
            part = module.get_submodule(full.removeprefix(f"{prefix}."))
            gradient = part.get_parameter("weight").grad
            if gradient is None:
                continue
            rows = gradient.T if is_transposed(part) else gradient
            facts = weight_facts(rows, f"the gradient of {full}.weight")
            if rows.ndim == 2:
                job.classes.add(layer.role, Side.WEIGHT_GRADIENTS, rows, facts)
            job.found[full] = replace(job.found[full], weight_gradients=facts)

    return visit


def _add_output_gradients(job: _Job, name: str, observer: TensorObserver) -> None:
    facts, sample, layer = observer.facts(), observer.sample(), job.found[name]
    job.classes.add(layer.role, Side.OUTPUT_GRADIENTS, sample, facts)
    decibels = gradient_qsnr(sample, job.candidates)
    errors = {text: replace(one, gradient_qsnr_db=decibels.get(text)) for text, one in layer.errors.items()}
    job.found[name] = replace(layer, output_gradients=facts, errors=errors)


def _summary(job: _Job, num_tokens: int, target_db: float, progress: Progress) -> ModelAnalysis:
    classes = job.classes.names()
    order = {side: place for place, side in enumerate(Side)}
    roles = list(dict.fromkeys(role for role, _ in classes))
    classes.sort(key=lambda one: (roles.index(one[0]), order[one[1]]))
    advice: list[Recommendation] = []
    for place, (role, side) in enumerate(classes):
        progress(place, len(classes), f"trying formats on {role} {side.value}")
        one = job.classes.recommendation(role, side, target_db)
        if one is not None:
            advice.append(one)
    progress(len(classes), len(classes), "")
    layers = tuple(job.found.values())
    return ModelAnalysis(
        layers=layers,
        curve=_curve(layers, job.candidates),
        recommendations=tuple(advice),
        histograms=tuple(job.classes.histogram(role, side) for role, side in classes),
        num_tokens=num_tokens,
    )


def _curve(layers: Sequence[LayerAnalysis], candidates: Sequence[Candidate]) -> tuple[CurvePoint, ...]:
    points: list[CurvePoint] = []
    for candidate in candidates:
        rows = [
            (layer.shape[0] * layer.shape[1], candidate.bits_per_weight((layer.shape[0], layer.shape[1]), 16.0), error)
            for layer in layers
            if layer.role != "lm_head"  # kept by most recipes
            and candidate.text in layer.errors
            and (error := layer.errors[candidate.text].output_error)
        ]
        if rows:
            weights = sum(size for size, _, _ in rows)
            bits = sum(size * each for size, each, _ in rows) / weights
            error = math.exp(sum(math.log(each) for _, _, each in rows) / len(rows))
            points.append(CurvePoint(candidate=candidate.text, bits=bits, output_error=error))
    return tuple(sorted(points, key=lambda point: point.bits))
