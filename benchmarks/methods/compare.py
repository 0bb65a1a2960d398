"""AutoRound, llm-compressor's GPTQ and microscale on one model, one text and one protocol: perplexity, time, memory.

Every tool quantizes the same model to MXFP4 (weights and activations, the head left out) on the same windows, of the
same text, and saves it; `microscale eval` scores what lies on disk. The peers live in an interpreter of their own.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import microscale
from microscale.integrations.loading import load_model
from microscale.jobs.calibration import read_windows
from microscale.jobs.shared_options import TextOptions

HERE = Path(__file__).parent


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", required=True, help="held-out texts")
    parser.add_argument("--peer-python", type=Path, help="interpreter with auto-round and llmcompressor")
    parser.add_argument("--runs", default="microscale:fast,microscale:good,llmcompressor,autoround:200")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=128, help="windows of calibration")
    parser.add_argument("--window", type=int, default=1024, help="tokens in each")
    parser.add_argument("--tokens", type=int, default=17391, help="tokens of each held-out text that are scored")
    parser.add_argument("--out", type=Path, default=Path("methods.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        windows = Path(folder) / "windows.npy"
        np.save(windows, calibration_windows(options).numpy())
        for word in ["unquantized", "rtn", *options.runs.split(",")]:
            if any(
                (row["model"], row["run"], row["device"]) == (options.model.name, word, name(options)) for row in rows
            ):
                continue
            row = one_run(word, options, windows, Path(folder) / word.replace(":", "-"))
            rows.append({"model": options.model.name, "run": word, "device": name(options), **row})
            print(json.dumps(rows[-1]), flush=True)
            options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(table(rows))


def name(options: argparse.Namespace) -> str:
    """Return what the work ran on."""
    if options.device != "cpu":
        return torch.cuda.get_device_name()
    return f"{options.threads} threads, {platform.machine()}"


def calibration_windows(options: argparse.Namespace) -> torch.Tensor:
    """Draw the windows as `microscale quantize --seed 0` does."""
    tokenizer, model = microscale.load_tokenizer(options.model), load_model(options.model)
    return read_windows(
        TextOptions(source=options.calibration, samples=options.samples, window=options.window), tokenizer, model
    ).windows


def one_run(word: str, options: argparse.Namespace, windows: Path, out: Path) -> dict[str, Any]:
    """Quantize with one tool, and score."""
    cost: dict[str, Any] = {}
    path = out
    if word == "unquantized":
        path = options.model
    elif word == "rtn":
        model = microscale.quantize(options.model, "mxfp4", activations="mxfp4:floor")
        microscale.save(model, out, tokenizer=microscale.load_tokenizer(options.model))
    else:
        tool, _, setting = word.partition(":")
        python = sys.executable if tool == "microscale" else str(options.peer_python)
        command = [python, str(HERE / "peers.py"), tool, str(options.model), str(windows), str(out)]
        command += ["--device", options.device, "--threads", str(options.threads)]
        if setting:
            command += ["--effort" if tool == "microscale" else "--iters", setting]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        cost = json.loads(done.stdout.strip().splitlines()[-1])
    return cost | {text.stem: score(path, text, options) for text in options.text}


def score(path: Path, text: Path, options: argparse.Namespace) -> float:
    """Return the perplexity of a checkpoint by the reference protocol."""
    model = microscale.load(path, dtype=torch.float32).to(options.device)
    tokenizer = microscale.load_tokenizer(path)
    found = microscale.evaluate(model, tokenizer=tokenizer, text=text, window=1024, tokens=options.tokens)
    return found.on_text.score.perplexity


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    costs = ("model", "run", "device", "seconds", "peak_bytes", "peak_gpu_bytes")
    texts = [key for key in rows[0] if key not in costs]
    lines = [
        f"| model | run | on | {' | '.join(texts)} | quantize s | peak GiB | GPU GiB |",
        "|---|---|---|" + "---:|" * (len(texts) + 3),
    ]
    for row in rows:
        scores = " | ".join(f"{row[text]:.2f}" for text in texts)
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else "–"
        memory = [f"{row.get(key, 0) / 2**30:.2f}" if row.get(key) else "–" for key in ("peak_bytes", "peak_gpu_bytes")]
        lines.append(
            f"| {row['model']} | {row['run']} | {row['device']} | {scores} | {seconds} | {' | '.join(memory)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
