"""A whole random Llama: ``microscale bench`` beside llama.cpp and torch bfloat16, in turns, at equal threads.

Every round runs each of them once: ours as a process of the command line, the peers as processes that stay. Decode
begins after the same number of prompt tokens everywhere. llama.cpp is tried with and without flash attention and
repacked weights, and its best setting is what we are compared with.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cpu.layers import INT8_BLOCKS
from benchmarks.cpu.results import CONSOLE, Figure
from benchmarks.cpu.timing import Times

HERE = Path(__file__).resolve().parent
SHAPE = {"hidden": 1536, "ffn": 4096, "layers": 12, "heads": 12, "kv_heads": 4, "vocab": 512}
DECODE_OVER_LLAMACPP = 1.5
END_TO_END_OVER_LLAMACPP = 1.3
PREFILL_OVER_LLAMACPP = 1.2
DECODE_OVER_TORCH = 3.0
OURS = (("mxfp4", INT8_BLOCKS), ("mxfp4", None))
OURS_OTHERS = tuple((name, INT8_BLOCKS) for name in ("mxfp8_e4m3", "mxint8", "mxfp6_e2m3", "mxfp4_plus", "nvfp4"))
PEER_OTHERS = ("q8_0", "bf16", "f32")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """What is measured."""

    peer_python: str | None
    work_dir: Path
    threads: int
    rounds: int
    prompts: Sequence[int]
    new_tokens: int
    ours: Sequence[tuple[str, str | None]]
    peer_types: Sequence[str]
    has_torch: str  # "bf16", or "" for none


@dataclass(slots=True)
class Peer:
    """A peer's process; one that died is started again, and its death is on record."""

    command: list[str]
    process: subprocess.Popen[str] | None = None
    deaths: list[str] = field(default_factory=list)

    def ask(self, **request: Any) -> dict[str, Any] | None:
        """Return the answer, or None where the peer died."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.deaths.append(f"{request.get('type', request['do'])}: exit code {self.process.wait()}")
            self.process = None
            return None
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()
            self.process = None


def measure_models(options: ModelOptions) -> tuple[list[Figure], dict[str, Any]]:
    """Measure everything in turns; returns the figures and what else the result file says."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    facts: dict[str, Any] = {"shape": SHAPE, "prompts": list(options.prompts), "new_tokens": options.new_tokens}
    torch_peer = Peer([sys.executable, str(HERE / "peer_torch.py")])
    python = options.peer_python
    peer = Peer([python, str(HERE / "peer_llamacpp.py"), "--work-dir", str(options.work_dir)]) if python else None
    try:
        if peer is not None:
            facts["llama.cpp"] = peer.ask(do="facts")
        for turn in range(options.rounds):
            CONSOLE.print(f"  models: round {turn + 1} of {options.rounds}", style="dim")
            for fmt, activations in options.ours:
                _run_ours(fmt, activations, options, seconds, facts)
            if peer is not None:
                for type_name in options.peer_types:
                    _run_llamacpp(peer, type_name, options, seconds, facts)
            if options.has_torch:
                _run_torch(torch_peer, options, seconds, facts)
        facts["deaths"] = [] if peer is None else peer.deaths
    finally:
        torch_peer.close()
        if peer is not None:
            peer.close()
    return _figures(seconds), facts


def _run_ours(
    fmt: str,
    activations: str | None,
    options: ModelOptions,
    seconds: dict[tuple[str, str], list[float]],
    facts: dict[str, Any],
) -> None:
    name = f"microscale {fmt}, {'float32' if activations is None else '8-bit blocks'}"
    shape = ",".join(f"{key}={value}" for key, value in SHAPE.items())
    for prompt in options.prompts:
        command = [sys.executable, "-m", "microscale", "bench", "--random-llama", shape, "--format", fmt]
        command += ["--activations", activations or "none", "--prompt-tokens", str(prompt), "--repeat", "3"]
        command += ["--new-tokens", str(options.new_tokens), "--threads", str(options.threads), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            facts.setdefault("failures", []).append(f"{name}: {(done.stderr or done.stdout).strip()[-400:]}")
            return
        answer = json.loads(done.stdout)
        facts.setdefault("ours", {})[name] = {key: answer.get(key) for key in ("requested", "executed")}
        facts.setdefault("start_seconds", {}).setdefault(name, []).append(answer["start_seconds"])
        for kind, key in (("prefill", f"prefill {prompt}"), ("decode", f"decode after {prompt}")):
            seconds[name, key] += [1 / value for value in answer[kind]["tokens_per_second"]["values"]]


def _run_llamacpp(
    peer: Peer,
    type_name: str,
    options: ModelOptions,
    seconds: dict[tuple[str, str], list[float]],
    facts: dict[str, Any],
) -> None:
    context = max(options.prompts) + options.new_tokens + 8
    for repack in (True, False):
        for flash in (False, True):
            setting = f"{'repacked' if repack else 'as stored'}, flash attention {'on' if flash else 'off'}"
            name = f"llama.cpp {type_name} ({setting})"
            load = {"shape": SHAPE, "type": type_name, "flash": flash, "repack": repack, "context": context}
            loaded = peer.ask(do="load", threads=options.threads, **load)
            if loaded is None or peer.ask(do="prefill", tokens=min(options.prompts)) is None:
                continue
            facts.setdefault("files", {})[type_name] = loaded
            _ask_speeds(peer, name, options, seconds)


def _run_torch(
    peer: Peer, options: ModelOptions, seconds: dict[tuple[str, str], list[float]], facts: dict[str, Any]
) -> None:
    if "torch" not in facts:
        facts["torch"] = peer.ask(do="load", shape=SHAPE, type=options.has_torch, threads=options.threads)
        peer.ask(do="prefill", tokens=min(options.prompts))
    _ask_speeds(peer, f"torch {options.has_torch}", options, seconds)


def _ask_speeds(peer: Peer, name: str, options: ModelOptions, seconds: dict[tuple[str, str], list[float]]) -> None:
    for prompt in options.prompts:
        for _ in range(3):
            answer = peer.ask(do="prefill", tokens=prompt)
            if answer is None:
                return
            seconds[name, f"prefill {prompt}"].append(answer["seconds"] / prompt)
        answer = peer.ask(do="decode", prompt=prompt, tokens=options.new_tokens)
        if answer is None:
            return
        seconds[name, f"decode after {prompt}"].append(statistics.fmean(answer["seconds"]))


def _figures(seconds: dict[tuple[str, str], list[float]]) -> list[Figure]:
    """Tokens per second; ours beside llama.cpp's best setting of MXFP4 and beside torch."""
    rates = {key: Times(seconds=tuple(values)).rate(1) for key, values in seconds.items()}
    figures = []
    for (name, task), rate in rates.items():
        goals = _peers_of(name, task, rates) or [("", None, None)]
        for compared_to, peer_rate, goal in goals:
            figures.append(
                Figure(
                    case=f"{name}: {task}",
                    unit="tokens/s",
                    **rate,
                    compared_to=compared_to,
                    ratio=None if peer_rate is None else rate["median"] / peer_rate,
                    goal=goal,
                    facts={"seconds_per_token": seconds[name, task]},
                )
            )
    return figures


def _peers_of(
    name: str, task: str, rates: dict[tuple[str, str], dict[str, float]]
) -> list[tuple[str, float | None, float | None]]:
    if not name.startswith("microscale"):
        return []
    has_goal = name == "microscale mxfp4, 8-bit blocks"
    is_decode = task.startswith("decode")
    best = max((rate["median"] for (peer, at), rate in rates.items() if "mxfp4 (" in peer and at == task), default=None)
    torch_rate = next((rate["median"] for (peer, at), rate in rates.items() if "torch" in peer and at == task), None)
    found: list[tuple[str, float | None, float | None]] = []
    if best is not None:
        goal = (DECODE_OVER_LLAMACPP if is_decode else PREFILL_OVER_LLAMACPP) if has_goal else None
        found.append(("llama.cpp mxfp4, best", best, goal))
    if torch_rate is not None:
        found.append(("torch bf16", torch_rate, DECODE_OVER_TORCH if has_goal and is_decode else None))
    return found
