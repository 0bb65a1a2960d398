"""Compare formats on one model: sizes and perplexities in one table, and on a page."""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from microscale.calibration.texts import read_text_file
from microscale.checkpoint.writer import check_text_target, write_text_file
from microscale.errors import FormatError, ModelError, counted
from microscale.formats import Format, list_items, parse_format
from microscale.formats.dtypes import dtype_name
from microscale.integrations.attention import apply_attention, attention_modules
from microscale.integrations.loading import check_window, load_original, logits_of, stored_dtype
from microscale.integrations.tokenizing import text_windows
from microscale.jobs.given_model import label_of, tokenizer_of
from microscale.jobs.reporting import SILENT, Reporter
from microscale.jobs.small_options import CompareOptions
from microscale.layerwise.devices import chosen_device, on_device
from microscale.nn.attention_setting import AttentionFormats
from microscale.nn.packed import PackedModule
from microscale.planning.comparison import ComparisonResult, compare_formats
from microscale.planning.executed import linear_words, summed
from microscale.report.comparison import ComparisonRow, comparison_html
from microscale.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareResult:
    """The rows of a comparison, the unquantized one first, and what they were measured on."""

    model: str
    text: str
    tokens: int
    window: int
    dtype: str
    formats: tuple[str, ...]
    rows: tuple[ComparisonResult, ...]

    def as_json(self) -> list[dict[str, Any]]:
        """Return one object for each row."""
        names = {"num_bytes": "bytes"}
        return [{names.get(name, name): value for name, value in dataclasses.asdict(row).items()} for row in self.rows]

    @property
    def report_rows(self) -> list[ComparisonRow]:
        """The rows as a table or page shows them."""
        shown = [dataclasses.asdict(row) for row in self.rows]
        base = self.rows[0].perplexity
        for row in shown:
            del row["seconds"], row["executed"]
            row["difference"] = row["perplexity"] - base
        return [ComparisonRow(**row) for row in shown]

    @property
    def facts(self) -> dict[str, str]:
        """What a reader of the page needs to repeat the comparison, and what ran."""
        executed = linear_words(summed(row.executed for row in self.rows))
        return {
            "model": Path(self.model).name,
            "text": Path(self.text).name,
            "tokens": str(self.tokens),
            "window": str(self.window),
            "computation": f"{self.dtype}; {executed}; activations dynamic, in the weights' format",
            "versions": f"microscale {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
            "date": datetime.date.today().isoformat(),
        }

    def page(self, samples: Sequence[tuple[str, str]] = ()) -> str:
        """Return the HTML page; ``samples`` are (label, text) pairs, the unquantized model's first.

        Raises:
            DependencyError: jinja2 or matplotlib is not installed.
        """
        title = f"{Path(self.model).name} in {counted(len(self.formats), 'format')}"
        return comparison_html(title, self.report_rows, facts=self.facts, samples=samples)


def compare(options: CompareOptions, reporter: Reporter = SILENT) -> CompareResult:
    """Quantize a model to several formats and score each: weights alone, weights with activations, and everything.

    Raises:
        FormatError: no format, or one that cannot be parsed.
        TextError, ModelError, CheckpointError: text or model cannot be used.
        DependencyError: a page without jinja2 or matplotlib.
    """
    if options.html is not None:
        check_text_target(options.html)
    device = chosen_device(options.device)
    formats = split_formats(options.formats)
    content = read_text_file(options.text)
    tokenizer = tokenizer_of(options.model, options.tokenizer)
    windows = text_windows(tokenizer, content, window=options.window, tokens=options.tokens)
    original, stored = _opened(options.model)
    check_window(original, options.window)
    if options.full:
        attention_modules(original)

    def round_attention(model: Any, fmt: Format | None) -> None:
        apply_attention(model, AttentionFormats(products=fmt))

    with on_device(original, device), reporter.stage("comparing") as advance:
        rows = compare_formats(
            original,
            formats,
            windows,
            logits_of,
            stored_dtype=stored,
            batch=options.batch,
            round_attention=round_attention if options.full else None,
            progress=advance,
        )
    found = CompareResult(
        model=label_of(options.model),
        text=str(options.text),
        tokens=sum(piece.numel() - 1 for piece in windows),
        window=options.window,
        dtype=dtype_name(original.dtype),
        formats=tuple(formats),
        rows=tuple(rows),
    )
    if options.html is not None:
        write_text_file(options.html, found.page())
    return found


def _opened(model: Any) -> tuple[Any, torch.dtype]:
    """Return a model to be computed with in float32, and the type that its weights are stored in."""
    if isinstance(model, str | Path):
        return load_original(model, dtype=torch.float32), stored_dtype(model)
    if any(isinstance(module, PackedModule) for module in model.modules()):
        raise ModelError("the model is quantized already; give the original model")
    return model, model.dtype


def split_formats(formats: str | Sequence[str]) -> list[str]:
    """Return the formats of a list, or of a text with commas between them (those in parentheses belong to a format).

    Raises:
        FormatError: no format, or one that cannot be parsed.
    """
    chosen = list_items(formats) if isinstance(formats, str) else list(formats)
    if not chosen:
        raise FormatError("no format to compare; write e.g. --formats mxfp8,mxfp4")
    for spec in chosen:
        parse_format(spec)
    return chosen
