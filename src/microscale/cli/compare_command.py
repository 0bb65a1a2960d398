"""``microscale compare``: several formats on one model in one table."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from microscale import __version__
from microscale.calibration import read_text_file
from microscale.checkpoint import check_text_target, write_text_file
from microscale.cli.eval_command import BatchOption, TextOption, TokensOption, WindowOption, text_windows
from microscale.cli.output import (
    JsonOption,
    SeedOption,
    command,
    console,
    print_json,
    progress_bar,
    tell_missing_kernels,
)
from microscale.errors import FormatError
from microscale.evaluation import DEFAULT_BATCH, DEFAULT_WINDOW
from microscale.formats import Format, list_items, parse_format
from microscale.nn import AttentionFormats
from microscale.planning import EVERYTHING, MODES, ComparisonResult, Step, compare_formats
from microscale.report import ComparisonRow, comparison_html, size_text

DEFAULT_FORMATS = "mxfp8,mxfp6_e2m3,mxfp4,mxfp4_plus,nvfp4"
WIDE = 100
"""Columns of a terminal that has room for three modes with their differences."""


@command
def compare(
    model: Annotated[str, typer.Argument(help="Directory or hub name of the original model.")],
    text: TextOption,
    formats: Annotated[
        str, typer.Option("--formats", help="Formats to compare, with commas between them.")
    ] = DEFAULT_FORMATS,
    tokens: TokensOption = None,
    window: WindowOption = DEFAULT_WINDOW,
    batch: BatchOption = DEFAULT_BATCH,
    full: Annotated[
        bool,
        typer.Option("--full", help="Also everything: the head, and the products of attention (simulated in floats)."),
    ] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a page with table and picture.")] = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """Quantize a model to several formats and score each: weights alone, weights with activations, and everything.

    Example: `microscale compare MODEL --formats mxfp8,mxfp4,nvfp4 --text book.txt --tokens 17391`
    """
    del seed
    from microscale.integrations.attention import apply_attention, attention_modules
    from microscale.integrations.loading import check_window, load_original, load_tokenizer, logits_of, stored_dtype

    tell_missing_kernels()
    if html is not None:
        check_text_target(html)
    chosen = split_formats(formats)
    content = read_text_file(text)
    tokenizer = load_tokenizer(model)
    windows = text_windows(tokenizer, content, window=window, tokens=tokens)
    original = load_original(model, dtype=torch.float32)
    check_window(original, window)
    if full:
        attention_modules(original)

    def round_attention(model: Any, fmt: Format | None) -> None:
        apply_attention(model, AttentionFormats(products=fmt))

    with progress_bar("comparing") as advance:

        def tell(step: Step) -> None:
            advance(step.done, step.total, f"{step.format} {step.mode}")

        rows = compare_formats(
            original,
            chosen,
            windows,
            logits_of,
            stored_dtype=stored_dtype(model),
            batch=batch,
            round_attention=round_attention if full else None,
            progress=tell,
        )
    if html is not None:
        facts = comparison_facts(model, str(text), sum(piece.numel() - 1 for piece in windows), window)
        page = comparison_html(
            f"{Path(model).name} in {len(chosen)} formats", report_rows(rows), facts=facts, samples=[]
        )
        write_text_file(html, page)
    if as_json:
        print_json([_as_dict(row) for row in rows])
        return
    console.print(comparison_table(rows))
    console.print("activations are rounded by each format's own rule; `quantize` says where a file layout has another")
    if html is not None:
        console.print(f"wrote {html}", markup=False)


def split_formats(text: str) -> list[str]:
    """Split at the commas outside parentheses.

    Raises:
        FormatError: no format, or one that cannot be parsed.
    """
    chosen = list_items(text)
    if not chosen:
        raise FormatError("no format to compare; write e.g. --formats mxfp8,mxfp4")
    for spec in chosen:
        parse_format(spec)
    return chosen


def comparison_table(rows: list[ComparisonResult]) -> Table:
    """Return the table of a comparison for the terminal: one line for each format, both modes side by side."""
    base = rows[0]
    by_format: dict[str, dict[str, ComparisonResult]] = {}
    for row in rows[1:]:
        by_format.setdefault(row.format, {})[row.mode] = row
    modes = list(dict.fromkeys(row.mode for row in rows[1:])) or list(MODES)
    meaning = "w: weights quantized, w+a: weights and activations"
    meaning += ", all: head and attention too" if EVERYTHING in modes else ""
    table = Table(title=f"Perplexity ({meaning})", title_justify="left")
    table.add_column("format", overflow="fold")
    has_differences = len(modes) <= len(MODES) or console.width >= WIDE
    titles = [title for mode in modes for title in (mode, f"Δ {mode}")] if has_differences else modes
    for title in ("bits", "model", *titles):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_row(base.format, f"{base.bits_per_weight:.2f}", size_text(base.num_bytes), f"{base.perplexity:.3f}")
    for found in by_format.values():
        weights = found[MODES[0]]
        scores = [found[mode].perplexity for mode in modes]
        cells = [f"{score:.3f}" for score in scores]
        if has_differences:
            cells = [cell for score in scores for cell in (f"{score:.3f}", f"{score - base.perplexity:+.3f}")]
        table.add_row(weights.format, f"{weights.bits_per_weight:.2f}", size_text(weights.num_bytes), *cells)
    return table


def report_rows(rows: list[ComparisonResult]) -> list[ComparisonRow]:
    """Translate results into the rows of the report."""
    return [
        ComparisonRow(
            format=row.format,
            mode=row.mode,
            bits_per_weight=row.bits_per_weight,
            num_bytes=row.num_bytes,
            perplexity=row.perplexity,
            difference=row.perplexity - rows[0].perplexity,
        )
        for row in rows
    ]


def comparison_facts(model: str, text: str, num_tokens: int, window: int) -> dict[str, str]:
    """Return what a reader of the page needs to repeat the comparison."""
    return {
        "model": Path(model).name,
        "text": Path(text).name,
        "tokens": str(num_tokens),
        "window": str(window),
        "computation": "float32, reference backend; activations dynamic, in the weights' format",
        "versions": f"microscale {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
    }


def _as_dict(row: ComparisonResult) -> dict[str, object]:
    return {
        "format": row.format,
        "mode": row.mode,
        "bits_per_weight": row.bits_per_weight,
        "bytes": row.num_bytes,
        "perplexity": row.perplexity,
        "seconds": row.seconds,
    }
