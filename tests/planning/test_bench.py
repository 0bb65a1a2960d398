"""Measuring speed: what is called, how often, and the figures made of the times."""

from __future__ import annotations

import mmap
import time

import pytest

from microscale.planning.bench import Speed, Speeds, measure_speed, resident_bytes


class Recorder:
    """Notes every call."""

    def __init__(self, pause: float = 0.0) -> None:
        self.calls: list[tuple[str, object]] = []
        self.pause = pause

    def reset(self) -> None:
        self.calls.append(("reset", None))

    def prefill(self, tokens: list[int], /) -> None:
        self.calls.append(("prefill", tuple(tokens)))
        time.sleep(self.pause)

    def step(self, token: int, /) -> None:
        self.calls.append(("step", token))


def run(recorder: Recorder, seed: int = 0) -> Speeds:
    return measure_speed(recorder, vocabulary=50, prompt_tokens=5, new_tokens=3, repeat=2, seed=seed)


def test_the_calls() -> None:
    recorder = Recorder()
    result = run(recorder)
    names = [name for name, _ in recorder.calls]
    assert names == ["reset", "prefill", "step", "step", "step"] * 3  # one repeat before is not counted
    assert len(result.prefill.values) == len(result.decode.values) == 2
    prompts = {value for name, value in recorder.calls if name == "prefill"}
    assert len(prompts) == 1 and all(0 <= token < 50 for token in next(iter(prompts)))  # type: ignore[call-overload]
    again, other = Recorder(), Recorder()
    run(again)
    run(other, seed=1)
    assert again.calls == recorder.calls != other.calls


def test_the_figures() -> None:
    result = run(Recorder(pause=0.02))
    assert 0 < result.prefill.lowest <= result.prefill.median <= result.prefill.highest <= 5 / 0.02
    speed = Speed(values=(4.0, 1.0, 3.0))
    assert (speed.median, speed.lowest, speed.highest) == (3.0, 1.0, 4.0)
    whole = Speeds(prompt_tokens=1, new_tokens=1, prefill=speed, decode=speed)
    assert whole.bytes_per_second(100) == 300.0


def test_progress_ends_at_the_last_repeat() -> None:
    seen: list[tuple[int, int]] = []
    measure_speed(
        Recorder(),
        vocabulary=2,
        prompt_tokens=1,
        new_tokens=1,
        repeat=2,
        seed=0,
        progress=lambda done, total, label: seen.append((done, total)),
    )
    assert seen == [(0, 2), (0, 2), (1, 2), (2, 2)]


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    assert before > 50e6  # Python and torch
    with mmap.mmap(-1, 100_000_000) as held:  # fresh pages, which no allocator has in stock
        for place in range(0, len(held), 4096):
            held[place] = 1
        assert resident_bytes() - before > 60e6


@pytest.mark.parametrize("values", [(1.0,), (2.0, 5.0)])
def test_a_speed_of_few_repeats(values: tuple[float, ...]) -> None:
    assert Speed(values=values).lowest <= Speed(values=values).median <= Speed(values=values).highest
