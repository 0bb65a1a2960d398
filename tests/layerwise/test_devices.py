"""Devices: the words, what is refused, and that a module comes back from where it was worked on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from microscale.errors import DeviceError
from microscale.layerwise.devices import chosen_device, device_of, fits, moved, on_device
from pretend_device import DEVICE, PretendDevice


def test_no_word_and_cpu() -> None:
    assert chosen_device(None) is None
    assert chosen_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("word", ["meta", "mps", "gpu", "cuda:x", "0"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(DeviceError, match=r"device is cpu, cuda, cuda:1 and so on, got '"):
        chosen_device(word)


def test_cuda_where_there_is_none_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"'cuda' was asked for, but torch .* sees no CUDA device here.*--device cpu"):
        chosen_device("cuda")


def test_a_number_that_is_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_available": True, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert [chosen_device(word) for word in ("cuda", "cuda:0")] == [torch.device("cuda", 1), torch.device("cuda", 0)]
    with pytest.raises(DeviceError, match="the last one here is cuda:1"):
        chosen_device("cuda:2")


def test_a_module_comes_back_as_it_is_then() -> None:
    model, device = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), PretendDevice()
    before = [parameter.clone() for parameter in model.parameters()]
    with device, on_device(model, DEVICE):
        assert device_of(model) == DEVICE
        model[1] = nn.Linear(4, 4, bias=False, device=DEVICE)
        assert model(torch.ones(2, 4, device=DEVICE)).device == DEVICE
    assert not any(device.is_there(parameter) for parameter in model.parameters())
    assert torch.equal(next(model.parameters()), before[0]) and model[1].bias is None
    with device:
        assert device_of(moved(model, DEVICE)) == DEVICE


def test_without_a_device_nothing_moves() -> None:
    model, device = nn.Linear(4, 4), PretendDevice()
    with device, on_device(model, None):
        assert device_of(model).type == "cpu"
    assert device.peak == 0 and moved(model, None) is model and fits(model, torch.device("cpu"))


def test_too_little_memory_is_said_in_our_words_and_the_module_comes_back() -> None:
    model, device = nn.Linear(64, 64), PretendDevice(limit=20_000)
    message = r"the memory of cuda:7 does not suffice \(CUDA out of memory\)"
    with pytest.raises(DeviceError, match=message), device, on_device(model, DEVICE):
        torch.zeros(4096, device=DEVICE)
    assert not device.is_there(model.weight)
    with device, pytest.raises(DeviceError, match="--device cpu"):
        moved(nn.Linear(128, 128), DEVICE)


def test_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(10, 10, bias=False)  # 400 bytes
    for free, answer in ((601, True), (600, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert fits(model, torch.device("cuda", 0)) is answer
