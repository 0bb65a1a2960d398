"""Progress as plain lines: what a redirected log holds, and how seldom."""

from __future__ import annotations

from microscale.cli.progress import ProgressLines


class Log:
    """Collects lines, by a clock that is set by hand."""

    def __init__(self, title: str) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.progress = ProgressLines(title, self.lines.append, lambda: self.now)

    def at(self, seconds: float, done: int, total: int, label: str = "") -> list[str]:
        """Make progress at a time; returns the lines that this wrote."""
        before = len(self.lines)
        self.now = seconds
        self.progress(done, total, label)
        return self.lines[before:]


def test_a_line_says_stage_count_elapsed_and_remaining() -> None:
    log = Log("quantizing")
    assert log.at(0, 0, 30, "layers.0") == []
    assert log.at(12, 1, 30) == []  # less than a twentieth
    assert log.at(24, 2, 30, "layers.2") == ["quantizing 2/30, 24 s, about 6 min left: layers.2"]
    assert log.at(300, 30, 30) == ["quantizing 30/30, 5 min"]


def test_lines_are_ten_seconds_and_a_twentieth_apart() -> None:
    log = Log("scoring")
    for step in range(1001):
        log.at(step, step, 1000)
    assert len(log.lines) == 20
    fast = Log("scoring")
    for step in range(1001):
        fast.at(step / 50, step, 1000)  # all of it in 20 seconds
    assert len(fast.lines) == 2


def test_a_slow_stage_is_never_silent_for_long() -> None:
    log = Log("study")
    log.at(0, 0, 10_000)
    assert log.at(59, 1, 10_000) == []
    assert log.at(61, 2, 10_000) == ["study 2/10000, 1 min, about 84 h left"]


def test_counts_inside_of_counts_have_their_own_pace() -> None:
    log = Log("quantizing")
    log.at(0, 0, 4, "layers.0")
    log.at(0, 0, 100, "learning")
    assert log.at(10, 50, 100, "learning") == ["quantizing 50/100, 10 s, about 10 s left: learning"]
    assert log.at(20, 1, 4, "layers.1") == ["quantizing 1/4, 20 s, about 1 min left: layers.1"]
    log.at(21, 0, 100, "learning")
    assert log.at(31, 50, 100, "learning") == ["quantizing 50/100, 31 s, about 10 s left: learning"]
