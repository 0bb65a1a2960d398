"""One tool quantizes one model to MXFP4, weights and activations, on windows that are given as token ids.

Run by compare.py, each tool in an interpreter of its own. Prints one line of JSON: seconds from the loaded model to the
quantized one, and the peak of resident memory (and of what torch allocated on a GPU) in bytes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def main() -> None:
    """Quantize and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=sorted(TOOLS))
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path, help="int64 token ids [samples, tokens] as .npy")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--iters", type=int, default=200, help="steps of AutoRound")
    parser.add_argument("--effort", default="good", help="effort of microscale's best")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    seconds = TOOLS[options.tool](options, torch.from_numpy(np.load(options.windows)))
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # getrusage would count the parent's memory too
    peak = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    gpu = torch.cuda.max_memory_allocated() if options.device != "cpu" else 0
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "peak_gpu_bytes": gpu}))


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """Load a model in its own dtype, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device)
    return model.eval(), AutoTokenizer.from_pretrained(options.model)


def llmcompressor(options: argparse.Namespace, windows: torch.Tensor) -> float:
    """GPTQ of llm-compressor with its own settings."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    model, tokenizer = load(options)
    rows = windows.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    started = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=[GPTQModifier(targets="Linear", scheme="MXFP4", ignore=["lm_head"])],
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(rows),
    )
    seconds = time.perf_counter() - started
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)
    return seconds


def autoround(options: argparse.Namespace, windows: torch.Tensor) -> float:
    """AutoRound with its own settings but for the number of steps."""
    from auto_round import AutoRound

    model, tokenizer = load(options)
    data = [{"input_ids": row.unsqueeze(0), "attention_mask": torch.ones(1, len(row))} for row in windows]
    started = time.perf_counter()
    rounder = AutoRound(
        model,
        tokenizer,
        scheme="MXFP4",
        iters=options.iters,
        dataset=data,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map=options.device,
    )
    rounder.quantize()
    seconds = time.perf_counter() - started
    rounder.save_quantized(str(options.out), format="llm_compressor")
    tokenizer.save_pretrained(options.out)
    return seconds


def microscale(options: argparse.Namespace, windows: torch.Tensor) -> float:
    """The method ``best`` of microscale at an effort."""
    import microscale as ours

    model, tokenizer = load(options)
    started = time.perf_counter()
    ours.quantize(
        model, "mxfp4", activations="mxfp4", method="best", effort=options.effort, calibration=windows, seed=0
    )
    seconds = time.perf_counter() - started
    ours.save(model, options.out, tokenizer=tokenizer)
    return seconds


TOOLS = {"autoround": autoround, "llmcompressor": llmcompressor, "microscale": microscale}

if __name__ == "__main__":
    main()
