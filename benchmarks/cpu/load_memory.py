"""Load one checkpoint in a fresh process and print how the resident memory grew, as one JSON object.

    python benchmarks/cpu/load_memory.py CHECKPOINT load|decoder

``load`` is ``microscale.load``, ``decoder`` what ``microscale generate`` and ``bench`` make, with a cache of a few
positions only, for the cache is no part of the checkpoint. Memory is counted after
the imports, mapped file pages included; the peak is the larger of samples taken every millisecond and of the system's
own high-water mark, where it can be reset.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

POSITIONS = 16


def status(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


class Sampler(threading.Thread):
    """Watches the resident memory until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stopped = threading.Event()
        self.samples: list[tuple[float, int]] = []

    def run(self) -> None:
        """Sample every millisecond (and whenever the loader lets go of the interpreter)."""
        while not self.stopped.wait(0.001):
            self.samples.append((time.perf_counter(), status("VmRSS")))


def load(path: str, way: str) -> Any:
    """Load in one of the two ways; returns what must stay alive."""
    import torch

    import microscale

    if way == "load":
        return microscale.load(path)
    engines = importlib.import_module("microscale.integrations.engines")
    model = engines.load_for_decoding(path, torch.float32)
    engine = engines.make_engine(model, positions=POSITIONS, compute_dtype=torch.float32, cache_dtype=torch.float32)
    return engine


def main() -> None:
    """Import, warm up on a tiny tensor, measure."""
    path, way = sys.argv[1:]
    import torch
    import transformers
    from transformers import LlamaForCausalLM  # noqa: F401  loaded here so that it is no part of the growth

    import microscale.hf  # noqa: F401
    from microscale.kernels import dequantize, quantize

    del transformers
    for module in ("engines", "loading"):
        try:
            importlib.import_module(f"microscale.integrations.{module}")
        except ModuleNotFoundError:
            if way == "decoder":
                raise
    dequantize(quantize(torch.randn(64, 64), "mxfp4"))
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        has_mark = True
    except OSError:
        has_mark = False
    before = status("VmRSS")
    sampler = Sampler()
    sampler.start()
    started = time.perf_counter()
    kept = load(path, way)
    seconds = time.perf_counter() - started
    sampler.stopped.set()
    sampler.join()
    gc.collect()
    size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    sampled = max((rss for _, rss in sampler.samples), default=0)
    peak = max(sampled, status("VmHWM") if has_mark else 0, status("VmRSS"))
    answer = {
        "way": way,
        "file_bytes": size,
        "before_bytes": before,
        "peak_growth_bytes": peak - before,
        "final_growth_bytes": status("VmRSS") - before,
        "final_anonymous_bytes": status("RssAnon"),
        "seconds": seconds,
        "num_samples": len(sampler.samples),
        "has_high_water_mark": has_mark,
        "kept": type(kept).__name__,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
