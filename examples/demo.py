"""The main job on the model that the project ships: compare formats, quantize, save, load, generate, report.

Run it with ``make demo``. Everything it writes goes to ``out/demo``. The text is the language reference that CPython
carries (pydoc_data), which the model has not seen in training.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import microscale
from microscale.checkpoint.writer import write_text_file
from microscale.integrations.generation import generate_text
from microscale.planning.inspection import inspect_checkpoint
from microscale.report.comparison import ComparisonRow, comparison_cells

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "models" / "llama-6m"
OUT = ROOT / "out" / "demo"
FORMATS = ["mxfp8", "mxfp6_e2m3", "mxfp4", "mxfp4_plus", "nvfp4", "e2m1/32:e8m0:rceil"]
PROMPTS = ["The sea was", "The function returns", "In the morning she"]
TOKENS, WINDOW = 8 * 1023, 1024

console = Console(highlight=False)


def reference_text() -> str:
    """The language reference of the running CPython, in the order of its topics."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def table(rows: Sequence[ComparisonRow]) -> Table:
    """The comparison as a table for the terminal."""
    titles, lines = comparison_cells(rows)
    found = Table(title="Perplexity (w: weights quantized, w+a: weights and activations)", title_justify="left")
    for title in titles:
        found.add_column(title, justify="left" if title == "format" else "right")
    for line in lines:
        found.add_row(*line)
    return found


def continue_prompts(model: object, tokenizer: object) -> list[str]:
    """Greedy continuations of the demo's prompts."""
    return [prompt + generate_text(model, tokenizer, prompt, max_new_tokens=24).text for prompt in PROMPTS]


def main() -> None:
    """Run the demo."""
    started = time.perf_counter()
    text = OUT / "CPython language reference"
    write_text_file(text, reference_text())
    console.print(f"1. compare {len(FORMATS)} formats on {MODEL.name}, {TOKENS} tokens of CPython's language reference")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("scoring", total=None)

        def tell(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        found = microscale.compare(MODEL, text=text, formats=FORMATS, tokens=TOKENS, window=WINDOW, progress=tell)
    console.print(table(found.report_rows))

    console.print("2. quantize to MXFP4+ with MXFP8 activations, save, load back, inspect")
    model = microscale.quantize(MODEL, "mxfp4_plus", activations="mxfp8")
    target = OUT / "llama-6m-mxfp4_plus"
    shutil.rmtree(target, ignore_errors=True)
    layout = microscale.save(model, target, tokenizer=microscale.load_tokenizer(MODEL))
    stored = inspect_checkpoint(target)
    console.print(
        f"   {target.relative_to(ROOT)}: layout {layout}, {len(stored.quantized)} layers of"
        f" {stored.bits_per_quantized_weight:.2f} bits, {stored.bits_per_weight:.2f} over the whole model with its"
        f" bfloat16 embedding, {stored.num_bytes / 1e6:.1f} MB instead of {2 * stored.num_weights / 1e6:.1f} MB"
    )

    console.print("3. generate with the original and with the quantized model")
    tokenizer = microscale.load_tokenizer(MODEL)
    original = microscale.load(MODEL, dtype=torch.float32)
    samples: list[tuple[str, str]] = []
    loaded = microscale.load(target, dtype=torch.float32)
    before, after = continue_prompts(original, tokenizer), continue_prompts(loaded, tokenizer)
    for one, other in zip(before, after, strict=True):
        console.print(f"   bfloat16: {one!r}\n   MXFP4+:   {other!r}", markup=False)
        samples += [("bfloat16", one), ("mxfp4_plus, activations mxfp8", other)]

    write_text_file(OUT / "report.html", found.page(samples))
    console.print(f"4. wrote {(OUT / 'report.html').relative_to(ROOT)}")
    console.print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
