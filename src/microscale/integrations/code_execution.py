"""Run programs that a model wrote, for HumanEval: each in a process of its own, with limits of time and memory.

This is no sandbox: the program has the rights of the user who runs it. It is why nothing here runs unless the flag
``--allow-code-execution`` was given; run it in a container or as a user that owns nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SECONDS = 10.0
MEMORY_BYTES = 2 * 2**30

_LIMITS = f"""
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
    resource.setrlimit(resource.RLIMIT_CPU, ({int(SECONDS)}, {int(SECONDS)}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except ImportError:
    pass
"""


def score_program(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 where the prompt with the model's completion passes the tests of a HumanEval document, else 0."""
    program = f"{doc['prompt']}{results[0]}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n"
    return {"pass_at_1": float(passes(program))}


def passes(program: str, *, seconds: float = SECONDS) -> bool:
    """Run a Python program; whether it reaches its end without an exception in the time it has.

    The end is told by a random word in a file, so that a program that leaves early does not pass.
    """
    word = os.urandom(16).hex()
    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder, "done")
        run = f"exec(compile({program!r}, 'program', 'exec'), {{'__name__': 'program'}})"
        source = f"{_LIMITS}\n{run}\nopen({str(done)!r}, 'w').write({word!r})\n"
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", source],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder},
            start_new_session=True,
        )
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end_group(process)
        return process.returncode == 0 and done.is_file() and done.read_text() == word


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
