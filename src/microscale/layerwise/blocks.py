"""Run the decoder layers of a model one by one, on inputs that are kept between them.

The arguments of every layer (masks, positions) are recorded once, with stand-ins that compute nothing, so that no more
than one layer has to be at hand afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microscale.algorithms.contract import LayerFunction
from microscale.errors import ModelError
from microscale.families.batch import Batch, run_model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockCall:
    """The arguments of a decoder layer besides its input, for one batch size."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    by_keyword: bool


class FoundError(Exception):
    """Ends a forward pass where nothing more is to be learnt from it."""


class BlockRunner:
    """Makes the inputs of the first block, then runs any block on any batch.

    ``is_tuple`` says whether the blocks return tuples (None: the first block, whose weights must be at hand, is tried);
    no other weight of a block is used before :meth:`run`.

    Raises:
        ModelError: a model whose layers are not called with their input first.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], windows: Batch, *, batch: int, is_tuple: bool | None = None
    ) -> None:
        self._model = model
        self._names = tuple(names)
        self._calls: dict[tuple[int, int], BlockCall] = {}
        self.device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
        self._pieces = tuple(windows.split(batch))
        first = self._pieces[0].to(self.device)
        self.is_tuple = self._returns_tuple(first[:1]) if is_tuple is None else is_tuple
        for size in sorted({len(piece) for piece in self._pieces}):
            self._record(first[:size], size)

    @property
    def num_batches(self) -> int:
        """How many batches the windows make."""
        return len(self._pieces)

    def embedded(self) -> Iterator[Float[Tensor, "batch tokens width"]]:
        """Yield what the first block gets, batch by batch, in float32."""
        for piece in self._pieces:
            yield self._embed(piece.to(self.device))

    def _returns_tuple(self, sample: Batch) -> bool:
        """Run the first layer to see what kind of value it returns."""
        block = self._model.get_submodule(self._names[0])
        seen: list[bool] = []

        def after(_module: nn.Module, _arguments: Any, output: Any) -> None:
            seen.append(isinstance(output, tuple))
            raise FoundError

        with removed_after(block.register_forward_hook(after)):
            self._forward(sample)
        if not seen:
            raise ModelError(f"{self._names[0]} is not run by the model; it cannot be calibrated layer by layer")
        return seen[0]

    def _forward(self, batch: Batch) -> None:
        with torch.no_grad(), contextlib.suppress(FoundError):
            run_model(self._model, batch)

    def _record(self, batch: Batch, size: int) -> None:
        """Record the arguments of all blocks with a batch of ``size``, the blocks passing their input on."""
        with contextlib.ExitStack() as stack:
            for index, name in enumerate(self._names):
                stand_in = self._recorder(index, size)
                stack.enter_context(replaced_forward({name: stand_in}, self._model))
            self._forward(batch)
        missing = [name for index, name in enumerate(self._names) if (index, size) not in self._calls]
        if missing:
            raise ModelError(f"{missing[0]} is not run by the model; it cannot be calibrated layer by layer")

    def _recorder(self, index: int, size: int) -> Callable[..., Any]:
        def record(*arguments: Any, **keywords: Any) -> Any:
            by_keyword = not arguments
            hidden = keywords.pop("hidden_states", None) if by_keyword else arguments[0]
            if not isinstance(hidden, Tensor):
                raise ModelError(f"{self._names[index]} does not get its hidden states first; this model is not known")
            self._calls[index, size] = BlockCall(arguments=arguments[1:], keywords=keywords, by_keyword=by_keyword)
            if all((each, size) in self._calls for each in range(len(self._names))):
                raise FoundError  # the head's logits of a whole batch would be the largest tensor of the job
            return (hidden,) if self.is_tuple else hidden

        return record

    def _embed(self, batch: Batch) -> Float[Tensor, "batch tokens width"]:
        """Return what the first block gets."""
        found: list[Tensor] = []

        def take(*arguments: Any, **keywords: Any) -> Any:
            found.append((arguments[0] if arguments else keywords["hidden_states"]).detach().to(torch.float32))
            raise FoundError

        with replaced_forward({self._names[0]: take}, self._model):
            self._forward(batch)
        return found[0]

    def run(self, index: int, hidden: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Run a block on the hidden states of a batch."""
        call = self._calls[index, hidden.shape[0]]
        block = self._model.get_submodule(self._names[index])
        hidden = hidden.to(self.device)
        keywords = {name: _as_float32(value) for name, value in call.keywords.items()}
        arguments = tuple(_as_float32(value) for value in call.arguments)
        if call.by_keyword:
            output = block(*arguments, hidden_states=hidden, **keywords)
        else:
            output = block(hidden, *arguments, **keywords)
        return output[0] if isinstance(output, tuple) else output


def _as_float32(value: Any) -> Any:
    """Masks and rotations in the dtype of the calibration, whatever the model's is."""
    if isinstance(value, Tensor):
        return value.to(torch.float32) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_as_float32(item) for item in value)
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


def giving(hidden: Tensor, *, is_tuple: bool) -> Callable[..., Any]:
    """Return a stand-in for a decoder layer that gives these hidden states, whatever it gets."""
    return lambda *_arguments, **_keywords: (hidden,) if is_tuple else hidden


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
