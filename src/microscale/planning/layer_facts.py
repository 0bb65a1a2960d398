"""What is known about one layer: the facts of its tensors, and what each candidate format makes of them.

    QSNR = 10 log10(Σ x² / Σ (x - x')²),   output error = Σ |y' - y|² / Σ |y|²,

with y' from rounded weights and rounded inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.kernels import fake_quantize
from microscale.planning.candidates import Candidate
from microscale.planning.recommendation import Recommendation, qsnr, recommend
from microscale.planning.tensor_facts import TensorFacts, noise_and_power

CLASS_ROWS = 12
"""Rows of every tensor that enter the sample of its class."""


class Side(Enum):
    """Which tensor of a layer."""

    WEIGHTS = "weights"
    INPUTS = "inputs"
    OUTPUT_GRADIENTS = "output gradients"
    WEIGHT_GRADIENTS = "weight gradients"


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateError:
    """What a candidate makes of a layer: decibels, and the relative squared error of its output.

    None: there are no such tensors, or the candidate leaves them alone. Gradients of outputs are rounded as inputs are.
    """

    weight_qsnr_db: float
    input_qsnr_db: float | None
    output_error: float | None
    gradient_qsnr_db: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAnalysis:
    """A layer with the facts of its tensors (None: not measured), and the errors by candidate (none for norms)."""

    name: str
    role: str
    shape: tuple[int, ...]
    weight: TensorFacts
    inputs: TensorFacts | None
    errors: Mapping[str, CandidateError]
    output_gradients: TensorFacts | None = None
    weight_gradients: TensorFacts | None = None

    def tensors(self) -> dict[Side, TensorFacts]:
        """Return the facts that are there, by side."""
        found = {
            Side.WEIGHTS: self.weight,
            Side.INPUTS: self.inputs,
            Side.OUTPUT_GRADIENTS: self.output_gradients,
            Side.WEIGHT_GRADIENTS: self.weight_gradients,
        }
        return {side: facts for side, facts in found.items() if facts is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassHistogram:
    """How the values of a class lie in their blocks: the mean of the histograms of its tensors."""

    role: str
    side: str
    shares: tuple[float, ...]


class TensorClasses:
    """Samples of the tensors of each class (role and side), for recommendations."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, Side], list[Tensor]] = {}
        self._facts: dict[tuple[str, Side], list[TensorFacts]] = {}

    def add(self, role: str, side: Side, rows: Float[Tensor, "rows cols"], facts: TensorFacts) -> None:
        """Take a few evenly chosen rows of a tensor in."""
        step = max(1, rows.shape[0] // CLASS_ROWS)
        self._rows.setdefault((role, side), []).append(rows[::step][:CLASS_ROWS].to("cpu", torch.float32, copy=True))
        self._facts.setdefault((role, side), []).append(facts)

    def names(self) -> list[tuple[str, Side]]:
        """Return the classes, in the order in which they came."""
        return list(self._rows)

    def histogram(self, role: str, side: Side) -> ClassHistogram:
        """Return the mean histogram of a class."""
        facts = self._facts[role, side]
        shares = tuple(sum(each) / len(facts) for each in zip(*(one.histogram for one in facts), strict=True))
        return ClassHistogram(role=role, side=side.value, shares=shares)

    def recommendation(self, role: str, side: Side, target_db: float) -> Recommendation | None:
        """Return what suits a class; None where all numbers are zero."""
        pieces, facts = self._rows[role, side], self._facts[role, side]
        widest = max(piece.shape[1] for piece in pieces)
        chosen = [piece for piece in pieces if piece.shape[1] == widest]
        if not any(bool((piece != 0).any()) for piece in chosen):
            return None
        return recommend(
            chosen,
            role=role,
            side=side.value,
            crest=sum(one.crest_mean for one in facts) / len(facts),
            kurtosis=sum(one.kurtosis for one in facts) / len(facts),
            outliers=sum(len(one.outlier_channels) for one in facts),
            target_db=target_db,
        )


def candidate_errors(
    weight: Float[Tensor, "rows cols"], inputs: Float[Tensor, "tokens cols"] | None, candidates: Sequence[Candidate]
) -> dict[str, CandidateError]:
    """Return what each candidate makes of a weight and of a sample of its inputs, both float32."""
    rows = inputs if inputs is not None and inputs.numel() else None
    wanted = None if rows is None else rows @ weight.T
    found: dict[str, CandidateError] = {}
    for candidate in candidates:
        fmt = candidate.weights.record
        rounded = weight if fmt is None else fake_quantize(weight, fmt)
        input_db = error = None
        if rows is not None and wanted is not None:
            seen = rows
            inputs_format = candidate.inputs_format
            if inputs_format is not None:
                seen = fake_quantize(rows, inputs_format)
                input_db = qsnr(rows, seen)
            noise, power = noise_and_power(wanted, seen @ rounded.T)
            error = noise / power if power else 0.0
        found[candidate.text] = CandidateError(
            weight_qsnr_db=qsnr(weight, rounded), input_qsnr_db=input_db, output_error=error
        )
    return found


def gradient_qsnr(gradients: Float[Tensor, "tokens rows"], candidates: Sequence[Candidate]) -> dict[str, float]:
    """Return the QSNR in decibels of gradients rounded as each candidate rounds inputs; none for one that does not."""
    return {
        candidate.text: qsnr(gradients, fake_quantize(gradients, fmt))
        for candidate in candidates
        if (fmt := candidate.inputs_format) is not None
    }
