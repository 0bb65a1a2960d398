"""Memory of results: mapped in one call from a size on, else left to torch."""

from __future__ import annotations

import pytest
import torch

from microscale.kernels.cpu import native
from microscale.kernels.cpu.memory import LARGE_BYTES, new_tensor


class Recorder:
    """Stands for the extension and notes what it is asked to map."""

    def __init__(self) -> None:
        self.mapped: list[tuple[int, int]] = []

    def prepare_memory(self, pointer: int, num_bytes: int) -> None:
        self.mapped.append((pointer, num_bytes))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.uint8, 1)])
def test_large_results_are_mapped_whole(dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(native, "NATIVE", recorder)
    cols = LARGE_BYTES // size // 4
    small = new_tensor((4, cols - 1), dtype)
    assert (tuple(small.shape), small.dtype, recorder.mapped) == ((4, cols - 1), dtype, [])
    large = new_tensor([2, 2, cols], dtype)
    assert recorder.mapped == [(large.data_ptr(), LARGE_BYTES)] and large.is_contiguous()


def test_without_the_extension_torch_maps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "NATIVE", None)
    assert new_tensor((LARGE_BYTES + 1,), torch.uint8).nbytes == LARGE_BYTES + 1
