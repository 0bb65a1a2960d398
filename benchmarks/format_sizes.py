"""Quantize a model to every named format from the command line, load it back, generate, and compare sizes with theory.

    python benchmarks/format_sizes.py MODEL [--prompt TEXT] [--json PATH]

Writes results/format_sizes.json and prints a table. Theory is the format's bits_per_value for each layer's shape.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from microscale.formats import NAMED_FORMATS
from microscale.planning.inspection import inspect_checkpoint

RESULTS = Path(__file__).parent / "results" / "format_sizes.json"


def run(*arguments: str) -> str:
    """Run the command line in a process of its own, as a user would; returns its standard output."""
    command = [sys.executable, "-m", "microscale", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measure(model: str, name: str, prompt: str, directory: Path) -> dict[str, object]:
    """Quantize, inspect, load and generate; returns one row."""
    target = str(directory / name)
    quantized = json.loads(run("quantize", model, "--format", name, "--output", target, "--json"))
    found = inspect_checkpoint(target)
    fmt = NAMED_FORMATS[name].format
    theory = sum(layer.num_weights * fmt.bits_per_value(*layer.shape) for layer in found.quantized) / 8
    text = json.loads(run("generate", target, prompt, "--max-new-tokens", "12", "--json"))["text"]
    files = sum(file.stat().st_size for file in Path(target).glob("*.safetensors"))
    stored = sum(layer.num_bytes for layer in found.quantized)
    return {
        "format": name,
        "layout": quantized["layout"],
        "bits_per_value_theory": fmt.bits_per_value(),
        "bits_per_weight_stored": found.bits_per_quantized_weight,
        "bytes_theory": theory,
        "bytes_stored": stored,
        "deviation_percent": 100 * (stored / theory - 1),
        "file_bytes": files,
        "text": text,
    }


def main() -> None:
    """Measure all named formats."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", default="The sea was")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    print(f"{'format':<16} {'layout':<19} {'theory':>7} {'stored':>7} {'off by':>8} {'file MB':>8}  text")
    with tempfile.TemporaryDirectory() as directory:
        for name in NAMED_FORMATS:
            row = measure(options.model, name, options.prompt, Path(directory))
            rows.append(row)
            print(
                f"{name:<16} {row['layout']:<19} {row['bits_per_value_theory']:7.3f}"
                f" {row['bits_per_weight_stored']:7.3f}"
                f" {row['deviation_percent']:7.2f}% {float(str(row['file_bytes'])) / 1e6:8.2f}  {row['text']!r}",
                flush=True,
            )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"model": Path(options.model).name, "rows": rows}, indent=1) + "\n")
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
