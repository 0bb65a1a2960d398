"""Programs that a model wrote: what passes, and what does not although it ends well."""

from __future__ import annotations

import time

import pytest

from microscale.integrations.code_execution import passes, score_program
from task_data import ROWS


def test_programs_pass_or_fail() -> None:
    document = ROWS["humaneval"][0]
    assert score_program(document, ["    return 2 * x\n"]) == {"pass_at_1": 1.0}
    assert score_program(document, ["    return x\n"]) == {"pass_at_1": 0.0}


@pytest.mark.parametrize(
    "program",
    [
        "raise ValueError",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def f(:",
        "while True: pass",
        "x = 'a' * (5 * 2**30)",
        "import time; time.sleep(60)",
        "print(input())",
    ],
)
def test_programs_that_do_not_end_well(program: str) -> None:
    assert not passes(program, seconds=2.0)


def test_a_program_sees_neither_our_environment_nor_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_USER", "1")
    assert passes("import os; assert 'SECRET_OF_THE_USER' not in os.environ")
    assert passes("import os; assert os.listdir('.') == []")


def test_a_child_ends_with_its_program() -> None:
    started = time.monotonic()
    child = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    assert not passes(child, seconds=0.5)
    assert time.monotonic() - started < 30, "nobody waits for the child"
