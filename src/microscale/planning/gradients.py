"""Gradients of the text's loss, one decoder layer at a time: one backward pass that never needs the whole model.

The loss is the mean of -log p(next token) over all predicted tokens of all windows. A forward pass has stored what each
decoder layer gets. From there: the head gives the gradients of the last hidden states; then each layer, the last first,
is computed once more on what it got, window by window, and gives the gradients of its weights, of its linear layers'
outputs and of its own input, which the layer before it goes on with. Last come the embeddings. The numbers are those of
an ordinary backward pass in float32.

Cost: about three forward passes of time; in memory one layer and its weights' gradients in float32, the gradients of
the hidden states of the text, and at both ends embeddings and head with their gradients in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microscale.calibration.cache import ActivationStore
from microscale.families.batch import Batch
from microscale.families.parts import is_inside, part_roots
from microscale.families.running import predict, run_model
from microscale.families.structure import BlockStructure
from microscale.layerwise.blocks import BlockRunner, FoundError, removed_after, replaced_forward
from microscale.layerwise.devices import on_device
from microscale.layerwise.loader import LayerLoader, float32_parameters
from microscale.planning.tensor_facts import TensorObserver

Visitor = Callable[[str, nn.Module, Mapping[str, TensorObserver]], None]
"""Gets a part's name ("": all outside of the decoder layers), the part with its weights' gradients in ``grad``, and
what the gradients of its linear layers' outputs were like, by name inside the part."""


def measure_gradients(
    loader: LayerLoader,
    blocks: Sequence[BlockStructure],
    windows: Batch,
    runner: BlockRunner,
    store: ActivationStore,
    visit: Visitor,
    advance: Callable[[str], None],
) -> None:
    """Call ``visit`` for each decoder layer, the last first, and for the rest of the model.

    ``store`` holds the input of every layer for every window, and the outputs of the last at its index plus one; it is
    emptied on the way.

    Raises:
        NonFiniteError: NaN or Inf in a gradient, with the layer's name.
    """
    model, names = loader.model, [block.name for block in blocks]
    ends = _ends(model, names)
    advance("gradients of the head")
    with float32_parameters(ends), torch.enable_grad():
        for parameter in ends:
            parameter.requires_grad_(parameter.is_floating_point())
        num_predicted = windows.token_ids[:, 1:].numel()
        flowing = [
            _through_head(model, names, window, _stored(store, len(names), place), runner, num_predicted)
            for place, window in enumerate(windows.split(1))
        ]
        head = {id(parameter): parameter.grad for parameter in ends if parameter.grad is not None}
    store.drop(len(names))
    for index in reversed(range(len(names))):
        advance(f"gradients of {names[index]}")
        with loader.layer(names[index]) as module, on_device(module, runner.device):
            outputs = _through_block(runner, index, module, blocks[index], store, flowing)
            visit(names[index], module, outputs)
        store.drop(index)
    advance("gradients of the embeddings")
    with float32_parameters(ends), torch.enable_grad():
        for parameter in ends:
            parameter.requires_grad_(parameter.is_floating_point())
            parameter.grad = head.pop(id(parameter), None)
        for window, gradient in zip(windows.split(1), flowing, strict=True):
            _through_embedding(model, names[0], window, gradient)
        with torch.no_grad():
            visit("", model, {})


def _ends(model: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """Return the parameters before and behind the decoder layers, without other parts than language."""
    apart = (*names, *(root for roots in part_roots(model).values() for root in roots))
    return [parameter for name, parameter in model.named_parameters() if not is_inside(name, apart)]


def _stored(store: ActivationStore, layer: int, window: int) -> Tensor:
    # A copy: what is stored must not change, and what comes from a file should not stay bound to it.
    return store.get(layer, window).clone()


def _through_head(
    model: Any, names: Sequence[str], window: Batch, hidden: Tensor, runner: BlockRunner, num_predicted: int
) -> Float[Tensor, "1 tokens width"]:
    """Return the gradient of the last hidden states of one window; those of the head add up in ``grad``."""
    hidden = hidden.to(runner.home).requires_grad_()
    give = runner.returned.stand_in(hidden)
    window = window.to(runner.home)
    with replaced_forward(dict.fromkeys(names, give), model):
        logits = predict(model, window)[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), window.token_ids[:, 1:].flatten(), reduction="sum")
    (loss / num_predicted).backward()
    assert hidden.grad is not None
    return hidden.grad


def _through_block(
    runner: BlockRunner,
    index: int,
    module: nn.Module,
    block: BlockStructure,
    store: ActivationStore,
    flowing: list[Tensor],
) -> dict[str, TensorObserver]:
    """Turn the gradients of a layer's outputs into those of its inputs, in place; weights' gradients add up."""
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    observers: dict[str, TensorObserver] = {}
    with contextlib.ExitStack() as stack:
        for name in (name for group in block.groups for name in group.linears):
            linear = module.get_submodule(name)
            stack.enter_context(removed_after(linear.register_forward_hook(_watching(observers, name, block.name))))
        for place, gradient in enumerate(flowing):
            inputs = _stored(store, index, place).to(runner.device).requires_grad_()
            with torch.enable_grad():
                runner.run(index, inputs, batch=place).backward(gradient.to(runner.device))
            assert inputs.grad is not None
            flowing[place] = inputs.grad.to(runner.home)
    return observers


def _watching(observers: dict[str, TensorObserver], name: str, block: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
        if not output.requires_grad or not output.numel():
            return
        if name not in observers:
            label = f"the gradient of {block}.{name}'s output"
            observers[name] = TensorObserver(output.shape[-1], label, output.device)
        output.register_hook(observers[name].update)

    return hook


def _through_embedding(model: Any, first: str, window: Batch, gradient: Tensor) -> None:
    """Add the gradients of the embeddings up in ``grad``."""
    found: list[Tensor] = []

    def take(*arguments: Any, **keywords: Any) -> Any:
        found.append(arguments[0] if arguments else keywords["hidden_states"])
        raise FoundError

    with replaced_forward({first: take}, model), contextlib.suppress(FoundError):
        run_model(model, window.to(gradient.device))
    found[0].backward(gradient.to(found[0].dtype))
