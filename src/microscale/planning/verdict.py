"""What an analysis comes to: one candidate, and why, in one sentence."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from microscale.errors import counted
from microscale.planning.analysis import ModelAnalysis
from microscale.planning.candidates import Candidate

FEW_BITS = 5.0
"""Up to so many bits a weight, methods that learn from text win back much of what rounding loses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The candidate to try first, whether a method should round to it, and the reason."""

    candidate: Candidate
    needs_method: bool
    sentence: str

    def command(self, model: str, text: str) -> str:
        """Return the command that quantizes a model so; ``text`` is what a method learns from."""
        candidate = self.candidate
        model, text = shlex.quote(model), shlex.quote(text)
        words = f"microscale quantize {model} -f {candidate.weights}"
        words += "" if candidate.activations is None else f" -a {candidate.activations}"
        own = "" if candidate.method is None else f" --method {candidate.method} --calibration {text}"
        learned = f" --method best --calibration {text}" if self.needs_method and not own else own
        return f"{words}{learned} -o OUT"


def judge(found: ModelAnalysis, candidates: Sequence[Candidate], target_db: float) -> Verdict | None:
    """Return the narrowest candidate whose mean output error is within the target, or else the most exact one.

    None where no candidate quantizes anything, or none could be measured.
    """
    by_text = {candidate.text: candidate for candidate in candidates if not candidate.is_kept}
    points = [point for point in found.curve if point.candidate in by_text and point.output_error >= 0]
    if not points:
        return None
    allowed = 10 ** (-target_db / 10)
    within = [point for point in points if point.output_error <= allowed]
    best = min(within, key=lambda one: (one.bits, one.output_error)) if within else None
    chosen = best or min(points, key=lambda one: one.output_error)
    lost = f"{100 * chosen.output_error:.3g} % of the power of the layers' outputs"
    if best is not None:
        reason = f"{chosen.candidate} ({chosen.bits:.2f} bits) is the narrowest format tried within {target_db:g} dB"
    else:
        reason = (
            f"no format tried is within {target_db:g} dB; {chosen.candidate} ({chosen.bits:.2f} bits) is the most exact"
        )
    inputs = {id(one.inputs): one.inputs for one in found.layers if one.inputs is not None}.values()
    massive = {one.channel for facts in inputs for one in facts.massive}
    outliers = sum(bool(facts.outlier_channels) for facts in inputs)
    needs_method = chosen.bits <= FEW_BITS
    hint = ""
    if massive or outliers:
        which = counted(len(massive), "massive channel") if massive else "no massive channel"
        hint = f"; {which}, outlier channels in {outliers} of {counted(len(inputs), 'layer input')}"
        hint += ", which a method tames" if needs_method else ""
    return Verdict(
        candidate=by_text[chosen.candidate], needs_method=needs_method, sentence=f"{reason}: it loses {lost}{hint}."
    )
