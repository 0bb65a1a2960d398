"""Which instruction-set level runs: found, forced, put back, and named where it is not there."""

from __future__ import annotations

import pytest
import torch

from microscale.errors import KernelError
from microscale.kernels.cpu import native


class Extension:
    """Stands for an extension that was built for three levels, on a machine that runs two."""

    def levels(self) -> list[tuple[int, str]]:
        return [(0, "portable"), (1, "avx2")]

    def best_level(self) -> int:
        return 1


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "NATIVE", Extension())
    monkeypatch.setattr(native, "_choice", native._Choice(1))
    monkeypatch.delenv(native.LEVEL_VARIABLE, raising=False)


@pytest.mark.usefixtures("extension")
def test_a_level_lasts_as_long_as_its_block() -> None:
    assert (native.level(), native.level_name()) == (1, "avx2")
    with native.use_level("portable"):
        assert (native.level(), native.level_name()) == (0, "portable")
        with native.use_level("avx2"):
            assert native.level_name() == "avx2"
        assert native.level_name() == "portable"
    assert native.level_name() == "avx2"
    with pytest.raises(ZeroDivisionError), native.use_level("portable"):
        raise ZeroDivisionError
    assert native.level_name() == "avx2"


@pytest.mark.usefixtures("extension")
def test_an_unknown_level_lists_those_that_are_there() -> None:
    expected = r"the instruction-set level 'avx512' is not there; this machine and build have: portable, avx2"
    with pytest.raises(KernelError, match=expected), native.use_level("avx512"):
        pytest.fail("the block is not entered")
    assert native.level() == 1


@pytest.mark.usefixtures("extension")
def test_the_environment_forces_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native._first_level() == 1
    monkeypatch.setenv(native.LEVEL_VARIABLE, "portable")
    assert native._first_level() == 0
    monkeypatch.setenv(native.LEVEL_VARIABLE, "")
    assert native._first_level() == 1, "an empty variable forces nothing"
    monkeypatch.setenv(native.LEVEL_VARIABLE, "sse2")
    with pytest.raises(KernelError, match="'sse2' is not there"):
        native._first_level()


def test_without_an_extension_there_is_no_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "NATIVE", None)
    monkeypatch.setattr(native, "_choice", native._Choice(native._first_level()))
    assert (native.levels(), native.level(), native.level_name()) == ({}, -1, "none")
    with pytest.raises(KernelError, match="this machine and build have: none"), native.use_level("portable"):
        pytest.fail("the block is not entered")


@pytest.mark.skipif(native.NATIVE is None, reason="the extension is not built")
def test_levels_are_listed_slowest_first() -> None:
    order = ("portable", "avx2", "avx512", "avx512_bf16")
    found = list(native.levels())
    assert found[0] == "portable" and found == [name for name in order if name in found]
    assert list(native.levels().values()) == sorted(native.levels().values())


def test_threads_are_those_of_torch() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert native.num_threads() == 3
    finally:
        torch.set_num_threads(before)
