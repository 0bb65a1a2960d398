"""Bring a layer, or a whole model, to the device where it is computed with, and back to where it lies.

A model that is larger than a device's memory is worked on layer by layer: each comes to the device for the time of a
block, its kept inputs lie beside the model, and one batch of them at a time follows it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import TypeVar

import torch
from torch import nn

from microscale.errors import DeviceError

M = TypeVar("M", bound=nn.Module)


def chosen_device(word: str | None) -> torch.device | None:
    """Return the device of a word: cpu, cuda, cuda:1 and so on; None stays None.

    Raises:
        DeviceError: another word, or a device that is not here.
    """
    if word is None:
        return None
    try:
        device = torch.device(word)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device is cpu, cuda, cuda:1 and so on, got {word!r}")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise DeviceError(
            f"device {word!r} was asked for, but torch {torch.__version__} sees no CUDA device here; compute with"
            " --device cpu, or install a torch built for CUDA (https://pytorch.org) where there is a GPU"
        )
    index = torch.cuda.current_device() if ":" not in word else device.index
    if index >= count:
        raise DeviceError(f"device {word!r} was asked for, but the last one here is cuda:{count - 1}")
    return torch.device("cuda", index)


def device_of(module: nn.Module) -> torch.device:
    """Return where a module lies, by its first tensor that is not on ``meta``; cpu for one without tensors."""
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


@contextlib.contextmanager
def on_device(module: nn.Module, device: torch.device | None) -> Generator[None, None, None]:
    """Have a module on a device inside the block (None: where it lies); what it consists of then comes back.

    Raises:
        DeviceError: the device has too little memory.
    """
    home = device_of(module)
    if device is None or device == home:
        yield
        return
    with _memory_of(device):
        try:
            module.to(device)
            yield
        finally:
            module.to(home)


def moved(module: M, device: torch.device | None) -> M:
    """Return a module that lies on a device from now on (None: where it is).

    Raises:
        DeviceError: the device has too little memory.
    """
    if device is None:
        return module
    with _memory_of(device):
        return module.to(device)


@contextlib.contextmanager
def _memory_of(device: torch.device) -> Generator[None, None, None]:
    """Say in our words that the memory of a device does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"the memory of {device} does not suffice ({str(error).partition('.')[0]}); give --device cpu, a smaller"
            " --batch or --window, or a method that goes layer by layer, such as gptq"
        ) from error


def wait_for(device: torch.device) -> None:
    """Return once a device has done all that it was given; a clock that is read earlier says nothing."""
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.synchronize(device)


def fits(module: nn.Module, device: torch.device) -> bool:
    """Whether the memory that is free on a device holds a module with half as much again to work in."""
    if device.type != "cuda":
        return True
    tensors = (*module.parameters(), *module.buffers())
    return 1.5 * sum(tensor.numel() * tensor.element_size() for tensor in tensors) < torch.cuda.mem_get_info(device)[0]
