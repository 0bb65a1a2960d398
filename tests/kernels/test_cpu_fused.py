"""The compiled norm, gate and transform: the same bits for any number of threads, and what they leave to quantize."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from microscale.errors import KernelError
from microscale.formats import parse_format
from microscale.kernels import cpu
from microscale.kernels.cpu import native
from vectors.inputs import same_bits

needs_kernels = pytest.mark.skipif(native.NATIVE is None, reason="the extension is not built")


def numbers(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@needs_kernels
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    values, fmt = numbers((131, 2080)), parse_format("mxfp6_plus")
    results: list[list[torch.Tensor]] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            weight = numbers((2080,), seed=1)
            packed = cpu.rms_norm_quantize(values, weight, 1e-5, fmt)
            results.append([cpu.rms_norm(values, weight, 1e-5), cpu.silu_mul(values, values), *packed.parts.values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(one, two) for one, two in zip(results[0], other, strict=True))


@needs_kernels
def test_the_weight_of_a_norm_may_be_wider_than_its_input() -> None:
    """Each is read in its own dtype: a float32 weight beside bfloat16 numbers is not rounded first."""
    values, weight = numbers((3, 64)), torch.full((64,), 1 + 2.0**-20)
    narrow = cpu.rms_norm(values, torch.ones(64), 1e-5).float()
    wide = cpu.rms_norm(values.float(), weight, 1e-5)
    assert same_bits(cpu.rms_norm(values, weight, 1e-5), wide.to(torch.bfloat16))
    assert not torch.equal(wide, narrow)


@needs_kernels
@pytest.mark.parametrize(
    "call",
    [
        lambda values: cpu.rms_norm(values, torch.ones(64), 1e-5),
        lambda values: cpu.hadamard_quantize(values, 16, parse_format("mxfp4")),
    ],
)
def test_other_devices_are_refused(call: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(KernelError, match="CPU"):
        call(torch.empty(2, 64, device="meta"))


def test_without_kernels_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "NATIVE", None)
    monkeypatch.setattr(native, "UNAVAILABLE", "there is no compiler")
    with pytest.raises(KernelError, match="there is no compiler"):
        cpu.silu_mul(torch.ones(2, 32), torch.ones(2, 32))
