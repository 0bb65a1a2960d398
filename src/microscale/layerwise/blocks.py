"""Run the decoder layers of a model one by one, on inputs that are kept between them.

The arguments of every layer (masks, positions) are recorded once, with stand-ins that compute nothing, so that no more
than one layer has to be at hand afterwards. Arguments that hang on the text (embeddings that later layers see again,
inputs for each layer) are recorded for each batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microscale.algorithms.contract import LayerFunction
from microscale.errors import ModelError
from microscale.families.batch import Batch
from microscale.families.running import run_model
from microscale.layerwise.devices import device_of
from microscale.layerwise.returned import CARRIED, Returned


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockCall:
    """The arguments of a decoder layer besides its input, for one batch or for all of its size.

    ``keyword`` is the name under which the input is given (None: it comes first). ``factor`` is what the model
    multiplies the hidden states by on their way from the layer before.
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    keyword: str | None
    factor: float = 1.0


class FoundError(Exception):
    """Ends a forward pass where nothing more is to be learnt from it."""


class BlockRunner:
    """Makes the inputs of the first block, then runs any block on any batch.

    ``returned`` says what the blocks return (None: the first block, whose weights must be at hand, is tried); no other
    weight of a block is used before :meth:`run`. ``device`` is where blocks are when they are run; all else of the
    model stays at :attr:`home`.

    Raises:
        ModelError: a model whose layers are not called with their input first, that hands more than hidden states from
            one layer to the next, or that does more to them in between than to multiply by a number.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        windows: Batch,
        *,
        batch: int,
        returned: Returned | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._model = model
        self._names = tuple(names)
        self.home = device_of(model)
        self.device = device or self.home
        self._pieces = tuple(windows.split(batch))
        self.returned = self._first_returns() if returned is None else returned
        self._calls = self._all_calls()

    @property
    def num_batches(self) -> int:
        """How many batches the windows make."""
        return len(self._pieces)

    def embedded(self) -> Iterator[Float[Tensor, "..."]]:
        """Yield what the first block gets, batch by batch, in float32."""
        for piece in self._pieces:
            yield self._embed(piece.to(self.home))

    def _first_returns(self) -> Returned:
        """Run the first layer to see what it returns."""
        block = self._model.get_submodule(self._names[0])
        seen: list[Returned] = []

        def after(_module: nn.Module, _arguments: Any, output: Any) -> None:
            seen.append(Returned.of(output))
            raise FoundError

        with removed_after(block.register_forward_hook(after)):
            self._forward(self._pieces[0][:1].to(self.home))
        if not seen:
            raise ModelError(f"{self._names[0]} is not run by the model; it cannot be calibrated layer by layer")
        return seen[0]

    def _forward(self, batch: Batch) -> None:
        with torch.no_grad(), contextlib.suppress(FoundError):
            run_model(self._model, batch)

    def _all_calls(self) -> tuple[Sequence[BlockCall], ...]:
        """Return the calls of all blocks by batch; those of one size are shared where no argument hangs on the text."""
        by_size: dict[int, Sequence[BlockCall]] = {}
        first = self._record(self._pieces[0])
        other = self._other_text()
        is_shared = other is not None and _is_same([_said(call) for call in first], [_said(call) for call in other])
        by_size[len(self._pieces[0])] = first
        calls: list[Sequence[BlockCall]] = [first]
        for piece in self._pieces[1:]:
            if not is_shared:
                calls.append(self._record(piece))
                continue
            if len(piece) not in by_size:
                by_size[len(piece)] = self._record(self._pieces[0][: len(piece)])
            calls.append(by_size[len(piece)])
        return tuple(calls)

    def _other_text(self) -> Sequence[BlockCall] | None:
        """Return the calls for another text of the first batch's size; None where there is none."""
        first = self._pieces[0]
        if len(self._pieces) > 1 and len(self._pieces[1]) == len(first):
            return self._record(self._pieces[1])
        if first.others or len(self._pieces) == 1:
            return None
        return self._record(Batch(token_ids=first.token_ids.flip(1)))

    def _record(self, batch: Batch) -> Sequence[BlockCall]:
        """Record the arguments of all blocks for a batch, the blocks passing their input on."""
        calls: dict[int, BlockCall] = {}
        last: list[Tensor] = []
        with contextlib.ExitStack() as stack:
            for index, name in enumerate(self._names):
                stand_in = functools.partial(self._note_call, calls, last, index)
                stack.enter_context(replaced_forward({name: stand_in}, self._model))
            self._forward(batch.to(self.home))
        missing = [name for index, name in enumerate(self._names) if index not in calls]
        if missing:
            raise ModelError(f"{missing[0]} is not run by the model; it cannot be calibrated layer by layer")
        return [calls[index] for index in range(len(self._names))]

    def _note_call(
        self, calls: dict[int, BlockCall], last: list[Tensor], index: int, *arguments: Any, **keywords: Any
    ) -> Any:
        """Stand in for a block: note its arguments, and give its input back as it would."""
        name = self._names[index]
        keyword = None if arguments else _input_keyword(keywords)
        hidden = keywords.pop(keyword, None) if keyword is not None else arguments[0]
        if not isinstance(hidden, Tensor):
            raise ModelError(f"{name} does not get its hidden states first; this model is not known")
        if any(value is CARRIED for value in (*arguments, *keywords.values())):
            raise ModelError(
                f"{name} gets more than hidden states from the layer before it, so that layers cannot be run one by"
                " one; use a method without calibration text, such as rtn or hadamard"
            )
        factor = 1.0 if not last or hidden is last[0] else _factor(last[0], hidden)
        if factor is None:
            raise ModelError(
                f"{name} gets other hidden states than the layer before it gave, so that layers cannot be run one by"
                " one; use a method without calibration text, such as rtn or hadamard"
            )
        calls[index] = BlockCall(arguments=arguments[1:], keywords=keywords, keyword=keyword, factor=factor)
        last[:] = [hidden]
        if len(calls) == len(self._names):
            raise FoundError  # the head's logits of a whole batch would be the largest tensor of the job
        return self.returned.giving(hidden)

    def _embed(self, batch: Batch) -> Float[Tensor, "..."]:
        """Return what the first block gets."""
        found: list[Tensor] = []

        def take(*arguments: Any, **keywords: Any) -> Any:
            hidden: Tensor = arguments[0] if arguments else keywords[_input_keyword(keywords)]
            found.append(hidden.detach().to(torch.float32))
            raise FoundError

        with replaced_forward({self._names[0]: take}, self._model):
            self._forward(batch)
        return found[0]

    def run(self, index: int, hidden: Float[Tensor, "..."], *, batch: int) -> Float[Tensor, "..."]:
        """Run a block on the hidden states of the batch with this number."""
        call = self._calls[batch][index]
        block = self._model.get_submodule(self._names[index])
        hidden = hidden.to(self.device)
        if call.factor != 1.0:
            hidden = hidden * call.factor
        keywords = {name: _to_device(_as_float32(value), self.device) for name, value in call.keywords.items()}
        arguments = tuple(_to_device(_as_float32(value), self.device) for value in call.arguments)
        if call.keyword is not None:
            output = block(*arguments, **{call.keyword: hidden}, **keywords)
        else:
            output = block(hidden, *arguments, **keywords)
        return output[0] if isinstance(output, tuple | list) else output


def _input_keyword(keywords: Mapping[str, Any]) -> str:
    """Return the name of the hidden states among keywords: the usual one, else that of the first [.., .., ..]."""
    floats = [name for name, each in keywords.items() if isinstance(each, Tensor) and each.ndim > 2]
    return "hidden_states" if "hidden_states" in keywords or not floats else floats[0]


def _said(call: BlockCall) -> tuple[Any, ...]:
    return (call.arguments, dict(call.keywords), call.factor)


def _factor(before: Tensor, after: Tensor) -> float | None:
    """Return the number that hidden states were multiplied by, or None where more was done to them."""
    if before.shape != after.shape:
        return None
    one, other = before.detach().to(torch.float64), after.detach().to(torch.float64)
    factor = float((one * other).sum() / (one * one).sum().clamp(min=1e-300))
    return factor if torch.allclose(one * factor, other, rtol=1e-2, atol=1e-6 * float(other.abs().max())) else None


def _is_same(one: Any, other: Any) -> bool:
    """Whether two arguments say the same; objects that are neither numbers nor collections always do."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping):
        keys = cast("Mapping[Any, Any]", one)
        return isinstance(other, Mapping) and all(key in other and _is_same(keys[key], other[key]) for key in keys)
    if isinstance(one, list | tuple):
        pairs = cast("Sequence[Any]", one)
        is_long = isinstance(other, list | tuple) and len(pairs) == len(cast("Sequence[Any]", other))
        return is_long and all(_is_same(*pair) for pair in zip(pairs, other, strict=True))
    return one == other if isinstance(one, int | float | str | None) else type(one) is type(other)


def _as_float32(value: Any) -> Any:
    """Masks and rotations in the dtype of the calibration, whatever the model's is."""
    if isinstance(value, Tensor):
        return value.to(torch.float32) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_as_float32(item) for item in cast("tuple[Any, ...]", value))
    return value


def _to_device(value: Any, device: torch.device) -> Any:
    """Masks and rotations where the block is, also those inside of collections."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        items = [_to_device(item, device) for item in cast("Sequence[Any]", value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in cast("dict[Any, Any]", value).items()}
    return value


@contextlib.contextmanager
def removed_after(handle: Any) -> Generator[None, None, None]:
    """Remove a hook at the end of the block."""
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def replaced_forward(
    stand_ins: Mapping[str, LayerFunction | Callable[..., Any]], model: nn.Module
) -> Generator[None, None, None]:
    """Let modules, by full name, compute something else inside the block."""
    modules = [model.get_submodule(name) for name in stand_ins]
    try:
        for module, function in zip(modules, stand_ins.values(), strict=True):
            module.__dict__["forward"] = function
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def to_float32(module: nn.Module) -> None:
    """Bring a module's float parameters into float32, without gradients."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)


@contextlib.contextmanager
def float32_model(model: nn.Module) -> Generator[Mapping[str, torch.dtype], None, None]:
    """Compute in float32 inside the block; what is still a float parameter afterwards gets its dtype back.

    Yields the dtypes by the parameters' names.
    """
    # Names of tied weights too: a rotation unties the head.
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    to_float32(model)
    try:
        yield dtypes
    finally:
        for name, parameter in model.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])
