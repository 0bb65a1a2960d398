"""A CUDA device that is made up: work for it can be tested where there is none.

Inside of :class:`PretendDevice` a tensor that is moved to ``cuda`` stays in the memory of the CPU, but says that it
lies on ``cuda:7``, and so does all that is computed with it. As on a real device, an operation whose tensors lie on two
devices is an error, and so is more memory than the device has. What autograd computes in C++ (gradients in hooks) is
not followed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 7)
"""A number that no real one has here, for tables are kept by device."""
_TORCH: Any = torch
_TENSOR: Any = Tensor
MIXING = {
    _TENSOR.copy_,
    _TENSOR.__getitem__,
    _TENSOR.__setitem__,
    _TENSOR.data.__set__,
    _TENSOR.grad.__set__,
    _TORCH._has_compatible_shallow_copy_type,
}
"""What takes tensors of two devices: copies, and looking up by indices on the CPU."""
MOVES = {Tensor.to: None, Tensor.cpu: "cpu", Tensor.cuda: "cuda"}
READS = {Tensor.numpy, Tensor.__array__}


class PretendDevice(TorchFunctionMode):
    """``limit`` is how many bytes the device has; :attr:`peak` how many lay there at most."""

    there: ClassVar[dict[int, tuple[StorageWeakRef, int]]] = {}
    """What lies there; of all such devices, for tables outlive them."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self.peak = 0
        self._limit = limit

    def is_there(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the made-up device."""
        with torch._C.DisableTorchFunction():
            return not tensor.is_meta and tensor.untyped_storage()._cdata in self.there

    @property
    def held(self) -> int:
        """The bytes that lie there now."""
        for key in [key for key, (ref, _) in self.there.items() if ref.expired()]:
            del self.there[key]
        return sum(size for _, size in self.there.values())

    def _put(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            if tensor.is_meta or storage._cdata in self.there:
                return
            self.there[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.held)
        if self.peak > self._limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function of torch as it would run were there such a device."""
        words = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and func == _TENSOR.device.__get__:
            return DEVICE if self.is_there(first) else func(*args, **words)
        if first is not None and func == _TENSOR.is_cuda.__get__:
            return self.is_there(first)
        if first is not None and func in MOVES:
            return self._move(first, args[1:], words, MOVES[func])
        tensors = list(_tensors((args, words)))
        is_there = [self.is_there(tensor) for tensor in tensors]
        if any(is_there) and func in READS:
            raise TypeError("can't convert cuda:7 device type tensor to numpy")
        outside = [t for t, there in zip(tensors, is_there, strict=True) if not there and t.ndim and not t.is_meta]
        if any(is_there) and outside and func not in MIXING:
            name = getattr(func, "__name__", func)
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:7 and cpu")
        goes = any(is_there)
        if words.get("device") is not None and torch.device(words["device"]).type != "meta":
            goes = torch.device(words["device"]).type == "cuda"
            words["device"] = "cpu"
        found = func(*args, **words)
        if func == Tensor.__getitem__ or func in MIXING:
            goes = goes and first is not None and self.is_there(first)
        if goes:
            for tensor in _tensors(found):
                self._put(tensor)
        return found

    def _move(self, tensor: Tensor, args: Sequence[Any], words: dict[str, Any], place: str | None) -> Tensor:
        """Carry a ``to``, ``cpu`` or ``cuda`` out."""
        target, rest = place or ("cuda" if self.is_there(tensor) else "cpu"), list[Any]()
        for each in (*args, words.pop("device", None)):
            if isinstance(each, str | torch.device):
                target = torch.device(each).type
            elif isinstance(each, Tensor):
                target = "cuda" if self.is_there(each) else "cpu"
                rest.append(each.dtype)
            elif each is not None:
                rest.append(each)
        if target == "meta" or tensor.is_meta:
            return tensor.to(target, *rest, **words)
        if not any(isinstance(each, torch.dtype) for each in rest):
            rest = []
        with torch._C.DisableTorchFunction():
            found = tensor.to(*rest, **words) if rest or words else tensor
            is_shared = found.untyped_storage()._cdata == tensor.untyped_storage()._cdata
        if is_shared and self.is_there(tensor) != (target == "cuda"):
            with torch._C.DisableTorchFunction():
                found = found.clone()
        if target == "cuda":
            self._put(found)
        return found


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in cast("Mapping[Any, Any]", value).values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in cast("Sequence[Any]", value):
            yield from _tensors(item)
