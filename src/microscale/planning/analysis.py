"""Look at a model's numbers layer by layer: what they are like, what each candidate format makes of them, what suits.

The decoder layers run one after the other on the inputs of the unquantized model, in float32; besides one layer and the
hidden states of the text nothing is kept. Errors are measured on a sample of ``SAMPLE_ROWS`` evenly chosen tokens:

    QSNR = 10 log10(Σ x² / Σ (x - x')²) of weights and of inputs,   output error = Σ |y' - y|² / Σ |y|²,

with y' from rounded weights and rounded inputs. Layers outside of the decoder layers (embeddings, head) and norms have
no inputs measured: only their weights are described.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microscale.calibration import InputStatistics, StatisticsCollector
from microscale.errors import ModelError
from microscale.families import describe
from microscale.formats import parse_activation
from microscale.kernels import fake_quantize
from microscale.nn import PackedModule
from microscale.planning.candidates import Candidate
from microscale.planning.recommendation import DEFAULT_TARGET_DB, Recommendation, qsnr, recommend
from microscale.planning.tensor_facts import (
    SAMPLE_ROWS,
    WANTED,
    LargestValues,
    TensorFacts,
    tensor_facts,
    weight_facts,
)
from microscale.recipes import Calibration, quantizable_modules
from microscale.recipes.blocks import BlockRunner, removed_after, to_float32
from microscale.recipes.recipe import parse_weights
from microscale.recipes.tasks import float_weight

CLASS_ROWS = 12
"""Rows of every tensor that enter the sample of its class."""

MAX_ROWS = 2048
"""Rows of an embedding or a head whose QSNR is measured."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateError:
    """What a candidate makes of a layer: decibels, and the relative squared error of its output (None: no inputs)."""

    weight_qsnr_db: float
    input_qsnr_db: float | None
    output_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAnalysis:
    """A layer with the facts of its weight and of its inputs, and the errors by candidate."""

    name: str
    role: str
    shape: tuple[int, ...]
    weight: TensorFacts
    inputs: TensorFacts | None
    errors: Mapping[str, CandidateError]


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A candidate over all layers: bits per weight and the geometric mean of output errors."""

    candidate: str
    bits: float
    output_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassHistogram:
    """How the values of a class lie in their blocks: the mean of the histograms of its tensors."""

    role: str
    side: str
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAnalysis:
    """All that was found."""

    layers: tuple[LayerAnalysis, ...]
    curve: tuple[CurvePoint, ...]
    recommendations: tuple[Recommendation, ...]
    histograms: tuple[ClassHistogram, ...]
    num_tokens: int


class _Classes:
    """Samples of the tensors of each class (role and side), for recommendations."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], list[Tensor]] = {}
        self.facts: dict[tuple[str, str], list[TensorFacts]] = {}

    def add(self, role: str, side: str, rows: Tensor, facts: TensorFacts) -> None:
        step = max(1, rows.shape[0] // CLASS_ROWS)
        self.rows.setdefault((role, side), []).append(rows[::step][:CLASS_ROWS].to(torch.float32).clone())
        self.facts.setdefault((role, side), []).append(facts)

    def histograms(self) -> list[ClassHistogram]:
        return [
            ClassHistogram(
                role=role,
                side=side,
                shares=tuple(sum(each) / len(facts) for each in zip(*(one.histogram for one in facts), strict=True)),
            )
            for (role, side), facts in self.facts.items()
        ]

    def recommendations(self, target_db: float, progress: Progress) -> list[Recommendation]:
        found: list[Recommendation] = []
        for index, ((role, side), pieces) in enumerate(self.rows.items()):
            progress(index, len(self.rows), f"trying formats on {role} {side}")
            facts = self.facts[role, side]
            widest = max(piece.shape[1] for piece in pieces)
            values = torch.cat([piece for piece in pieces if piece.shape[1] == widest])
            if not bool((values != 0).any()):
                continue
            found.append(
                recommend(
                    values,
                    role=role,
                    side=side,
                    crest=sum(one.crest_mean for one in facts) / len(facts),
                    kurtosis=sum(one.kurtosis for one in facts) / len(facts),
                    outliers=sum(len(one.outlier_channels) for one in facts),
                    target_db=target_db,
                )
            )
        return found


@torch.no_grad()
def analyze_model(
    model: Any,
    candidates: Sequence[Candidate],
    calibration: Calibration,
    *,
    target_db: float = DEFAULT_TARGET_DB,
    progress: Progress,
) -> ModelAnalysis:
    """Analyze a model; it stays as it is.

    Raises:
        ModelError: the model is quantized already, or its layers cannot be run one by one.
        NonFiniteError: NaN or Inf in a weight or in the inputs of a layer, with its name.
    """
    if any(isinstance(module, PackedModule) for module in model.modules()):
        raise ModelError("the model is quantized already; analyze the original")
    structure = describe(model)
    names = [block.name for block in structure.blocks]
    classes = _Classes()
    found: list[LayerAnalysis] = []
    with _float32(model.get_submodule(names[0])):
        runner = BlockRunner(model, names, calibration.windows, batch=1)
    hidden = list(runner.embedded())
    for index, block in enumerate(structure.blocks):
        progress(index, len(names), block.name)
        module = model.get_submodule(block.name)
        with _float32(module):
            inputs = _measured(runner, index, block.groups, module, hidden)
            for group in block.groups:
                statistics, largest = inputs[group.linears[0]]
                facts = tensor_facts(statistics, largest) if statistics.num_tokens else None
                if facts is not None:
                    classes.add(group.role, "inputs", statistics.require("sample"), facts)
                for name in group.linears:
                    weight = float_weight(module.get_submodule(name))
                    own = weight_facts(weight, f"{block.name}.{name}.weight")
                    classes.add(group.role, "weights", weight, own)
                    found.append(
                        LayerAnalysis(
                            name=f"{block.name}.{name}",
                            role=group.role,
                            shape=tuple(weight.shape),
                            weight=own,
                            inputs=facts,
                            errors=layer_errors_of(weight, statistics, candidates),
                        )
                    )
    found += _outside(model, {layer.name for layer in found}, candidates, classes)
    progress(len(names), len(names), "")
    return ModelAnalysis(
        layers=tuple(found),
        curve=_curve(found, candidates),
        histograms=tuple(classes.histograms()),
        recommendations=tuple(classes.recommendations(target_db, progress)),
        num_tokens=calibration.windows.numel(),
    )


@contextlib.contextmanager
def _float32(module: nn.Module) -> Generator[None, None, None]:
    """Compute in float32 inside the block; the parameters get their own tensors back, to the bit and in place."""
    before = {name: (parameter.data, parameter.requires_grad) for name, parameter in module.named_parameters()}
    to_float32(module)
    try:
        yield
    finally:
        for name, parameter in module.named_parameters():
            parameter.data, needs_grad = before[name]
            parameter.requires_grad_(needs_grad)


def _measured(
    runner: BlockRunner, index: int, groups: Sequence[Any], module: nn.Module, hidden: list[Tensor]
) -> dict[str, tuple[InputStatistics, LargestValues]]:
    """Run a decoder layer over all windows, in place of its inputs, and measure what its groups get."""
    parts: dict[str, tuple[StatisticsCollector, LargestValues]] = {}
    with contextlib.ExitStack() as stack:
        for group in groups:
            name = group.linears[0]
            linear = module.get_submodule(name)
            cols = float_weight(linear).shape[1]
            collector = StatisticsCollector(cols, wanted=WANTED, sample_rows=SAMPLE_ROWS, name=name)
            parts[name] = (collector, LargestValues())
            stack.enter_context(removed_after(linear.register_forward_pre_hook(_feeding(*parts[name]))))
        for place, batch in enumerate(hidden):
            hidden[place] = runner.run(index, batch)
    return {name: (collector.result(), largest) for name, (collector, largest) in parts.items()}


def _feeding(collector: StatisticsCollector, largest: LargestValues) -> Callable[..., None]:
    def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        collector.update(arguments[0])
        largest.update(arguments[0])

    return hook


def layer_errors_of(
    weight: Tensor, inputs: InputStatistics | None, candidates: Sequence[Candidate]
) -> dict[str, CandidateError]:
    """Return what each candidate makes of a weight [rows, cols] and of the sample of its inputs."""
    rows = None if inputs is None or not inputs.num_tokens else inputs.require("sample").to(torch.float32)
    wanted = None if rows is None else rows @ weight.T
    found: dict[str, CandidateError] = {}
    for candidate in candidates:
        fmt = parse_weights(candidate.weights)
        rounded = weight if fmt is None else fake_quantize(weight, fmt)
        input_db = error = None
        if rows is not None and wanted is not None:
            seen = rows
            if candidate.activations is not None:
                seen = fake_quantize(rows, parse_activation(candidate.activations).format)
                input_db = qsnr(rows, seen)
            power = float(wanted.square().sum(dtype=torch.float64))
            noise = float((seen @ rounded.T).sub_(wanted).square().sum(dtype=torch.float64))
            error = noise / power if power else 0.0
        found[candidate.text] = CandidateError(
            weight_qsnr_db=qsnr(weight, rounded), input_qsnr_db=input_db, output_error=error
        )
    return found


def _outside(model: Any, done: set[str], candidates: Sequence[Candidate], classes: _Classes) -> list[LayerAnalysis]:
    """Return embeddings, the head, other linear layers and norms: weights alone."""
    found: list[LayerAnalysis] = []
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    modules = quantizable_modules(model)
    for name, (kind, module) in modules.items():
        if name in done:
            continue
        weight = float_weight(module)
        own = weight_facts(weight, f"{name}.weight")
        role = "embedding" if kind == "embedding" else "lm_head" if module is head else "other"
        classes.add(role, "weights", weight, own)
        step = max(
            1, weight.shape[0] // MAX_ROWS
        )  # a vocabulary's worth of rows would be the largest tensor of the job
        errors = layer_errors_of(weight[::step][:MAX_ROWS].contiguous(), None, candidates)
        found.append(
            LayerAnalysis(name=name, role=role, shape=tuple(weight.shape), weight=own, inputs=None, errors=errors)
        )
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and parameter.ndim == 1:
            own = weight_facts(parameter.to(torch.float32), name)
            shape = tuple(parameter.shape)
            found.append(LayerAnalysis(name=owner, role="norm", shape=shape, weight=own, inputs=None, errors={}))
    return found


def _curve(layers: Sequence[LayerAnalysis], candidates: Sequence[Candidate]) -> tuple[CurvePoint, ...]:
    points: list[CurvePoint] = []
    for candidate in candidates:
        rows = [
            (layer.shape[0] * layer.shape[1], candidate.bits_per_weight((layer.shape[0], layer.shape[1]), 16.0), error)
            for layer in layers
            if candidate.text in layer.errors and (error := layer.errors[candidate.text].output_error)
        ]
        if rows:
            weights = sum(size for size, _, _ in rows)
            bits = sum(size * each for size, each, _ in rows) / weights
            error = math.exp(sum(math.log(each) for _, _, each in rows) / len(rows))
            points.append(CurvePoint(candidate=candidate.text, bits=bits, output_error=error))
    return tuple(sorted(points, key=lambda point: point.bits))
