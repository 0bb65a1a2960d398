"""The main job on the model that the project ships: compare formats, quantize, save, load, generate, report.

Run it with ``make demo``. Everything it writes goes to ``out/demo``. The text is the language reference that CPython
carries (pydoc_data), which the model has not seen in training.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from pydoc_data import topics

import torch
from rich.console import Console
from rich.progress import Progress

import microscale
from microscale.checkpoint import write_text_file
from microscale.cli.compare_command import comparison_facts, comparison_table, report_rows
from microscale.cli.eval_command import text_windows
from microscale.integrations.generation import generate_text
from microscale.integrations.loading import load_original, logits_of
from microscale.planning import Step, compare_formats, inspect_checkpoint
from microscale.report import comparison_html

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


def continue_prompts(model: object, tokenizer: object) -> list[str]:
    """Greedy continuations of the demo's prompts."""
    return [prompt + generate_text(model, tokenizer, prompt, max_new_tokens=24).text for prompt in PROMPTS]


def main() -> None:
    """Run the demo."""
    started = time.perf_counter()
    tokenizer = microscale.load_tokenizer(MODEL)
    windows = text_windows(tokenizer, reference_text(), window=WINDOW, tokens=TOKENS)
    console.print(f"1. compare {len(FORMATS)} formats on {MODEL.name}, {TOKENS} tokens of CPython's language reference")
    original = load_original(MODEL, dtype=torch.float32)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("scoring", total=None)

        def tell(step: Step) -> None:
            progress.update(task, completed=step.done, total=step.total, description=f"{step.format} {step.mode}")

        rows = compare_formats(original, FORMATS, windows, logits_of, stored_dtype=torch.bfloat16, progress=tell)
    console.print(comparison_table(rows))

    console.print("2. quantize to MXFP4+ with MXFP8 activations, save, load back, inspect")
    model = microscale.quantize(MODEL, "mxfp4_plus", activations="mxfp8")
    target = OUT / "llama-6m-mxfp4_plus"
    shutil.rmtree(target, ignore_errors=True)
    layout = microscale.save(model, target, tokenizer=tokenizer)
    found = inspect_checkpoint(target)
    console.print(
        f"   {target.relative_to(ROOT)}: layout {layout}, {len(found.quantized)} layers of"
        f" {found.bits_per_quantized_weight:.2f} bits, {found.bits_per_weight:.2f} over the whole model with its"
        f" bfloat16 embedding, {found.num_bytes / 1e6:.1f} MB instead of {2 * found.num_weights / 1e6:.1f} MB"
    )

    console.print("3. generate with the original and with the quantized model")
    samples: list[tuple[str, str]] = []
    loaded = microscale.load(target, dtype=torch.float32)
    before, after = continue_prompts(original, tokenizer), continue_prompts(loaded, tokenizer)
    for one, other in zip(before, after, strict=True):
        console.print(f"   bfloat16: {one!r}\n   MXFP4+:   {other!r}", markup=False)
        samples += [("bfloat16", one), ("mxfp4_plus, activations mxfp8", other)]

    facts = comparison_facts(str(MODEL), "CPython language reference", TOKENS, WINDOW)
    page = comparison_html(f"{MODEL.name} in {len(FORMATS)} formats", report_rows(rows), facts=facts, samples=samples)
    write_text_file(OUT / "report.html", page)
    console.print(f"4. wrote {(OUT / 'report.html').relative_to(ROOT)}")
    console.print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
