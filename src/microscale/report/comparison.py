"""The page of ``microscale compare``: formats side by side, as one HTML file that needs nothing else.

Style, script and picture stand inside the page, so it opens offline and can be sent as it is. It computes
nothing: every number comes from the rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from microscale.nn.sizes import size_text
from microscale.report.bars import CUT_MARK, difference_bars
from microscale.report.page import page_template

UNQUANTIZED = "none"
WEIGHTS = "w"
WEIGHTS_AND_ACTIVATIONS = "w+a"
DIFFERENCE = "Δ"
"""What the titles of differences begin with."""

_MODES = {
    UNQUANTIZED: "not quantized",
    WEIGHTS: "weights",
    WEIGHTS_AND_ACTIVATIONS: "weights + activations",
    "all": "everything",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRow:
    """One measured variant of a model.

    ``mode`` is ``none`` (the model as it came, ``format`` then its dtype), ``w`` (weights quantized), ``w+a`` (weights
    and activations) or ``all`` (head and attention too; in the table alone). ``bits_per_weight`` counts the quantized
    layers, ``num_bytes`` and ``model_bits_per_weight`` all weights together. ``difference`` is the perplexity minus
    that of the unquantized row.
    """

    format: str
    mode: str
    bits_per_weight: float
    num_bytes: int
    model_bits_per_weight: float
    perplexity: float
    difference: float


def comparison_html(
    title: str, rows: Sequence[ComparisonRow], *, facts: Mapping[str, str], samples: Sequence[tuple[str, str]]
) -> str:
    """Return the page as text.

    ``facts`` are shown as label and value (model, text, tokens, versions, date …); ``samples`` are (label, text)
    pairs, the unquantized model's first. Rows and bars keep the given order. NaN and Inf are shown as words.

    Raises:
        DependencyError: jinja2 or matplotlib is not installed.
    """
    picture = _picture(rows)
    template = page_template("comparison.html.j2")
    return template.render(
        title=title,
        rows=[_shown(row) for row in rows],
        facts=list(facts.items()),
        samples=samples,
        picture=picture,
        has_cut_bars=CUT_MARK in picture,
    )


def comparison_cells(rows: Sequence[ComparisonRow]) -> tuple[list[str], list[list[str]]]:
    """Return titles and lines of a comparison as text, one line for each format, all modes side by side.

    The line of the unquantized model, the first row, has one perplexity and ends there.
    """
    base = rows[0]
    by_format: dict[str, dict[str, ComparisonRow]] = {}
    for row in rows[1:]:
        by_format.setdefault(row.format, {})[row.mode] = row
    modes = list(dict.fromkeys(row.mode for row in rows[1:])) or [WEIGHTS, WEIGHTS_AND_ACTIVATIONS]
    titles = [
        "format",
        "bits",
        "model",
        "model bits",
        *(title for mode in modes for title in (mode, f"{DIFFERENCE} {mode}")),
    ]

    def begin(row: ComparisonRow) -> list[str]:
        bits = f"{row.bits_per_weight:.2f}"
        return [row.format, bits, size_text(row.num_bytes), f"{row.model_bits_per_weight:.2f}"]

    lines = [[*begin(base), f"{base.perplexity:.3f}"]]
    for found in by_format.values():
        scores = [(f"{found[mode].perplexity:.3f}", f"{found[mode].difference:+.3f}") for mode in modes]
        lines.append([*begin(found[WEIGHTS]), *(cell for pair in scores for cell in pair)])
    return titles, lines


def _picture(rows: Sequence[ComparisonRow]) -> str:
    """Return the bars of all quantized rows, or nothing where there is no such row."""
    names = list(dict.fromkeys(row.format for row in rows if row.mode != UNQUANTIZED))
    by_mode = {
        mode: {row.format: row.difference for row in rows if row.mode == mode}
        for mode in (WEIGHTS, WEIGHTS_AND_ACTIVATIONS)
    }
    return difference_bars(names, by_mode[WEIGHTS], by_mode[WEIGHTS_AND_ACTIVATIONS]) if names else ""


def _shown(row: ComparisonRow) -> dict[str, str]:
    """Return the texts of one table row, with the plain numbers to sort by."""
    return {
        "format": row.format,
        "mode": _MODES.get(row.mode, row.mode),
        "is_baseline": "yes" if row.mode == UNQUANTIZED else "",
        "bits": f"{row.bits_per_weight:.2f}",
        "bits_sort": _sort_key(row.bits_per_weight),
        "bytes": f"{size_text(row.num_bytes)}, {row.model_bits_per_weight:.2f} bits per weight",
        "bytes_exact": f"{row.num_bytes:,} bytes",
        "bytes_sort": str(row.num_bytes),
        "perplexity": number_text(row.perplexity),
        "perplexity_sort": _sort_key(row.perplexity),
        "difference": "" if row.mode == UNQUANTIZED else difference_text(row.difference),
        "difference_sort": _sort_key(row.difference),
    }


def _sort_key(value: float) -> str:
    """Return a number for sorting: Inf and NaN go last."""
    return repr(value) if math.isfinite(value) else "1e308"


def number_text(value: float) -> str:
    """Return a perplexity as shown: two decimals, none from a thousand on, a word where not finite."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def difference_text(value: float) -> str:
    """Return a difference as shown, always with its sign."""
    if math.isnan(value):
        return "nan"
    sign = "−" if value < 0 else "+"
    return sign + number_text(abs(value))
