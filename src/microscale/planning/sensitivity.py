"""How much a model suffers where one layer is quantized: three measures, by layer and candidate.

Each is taken on the unquantized model's own inputs, one layer at a time, so that a sum over layers stands for the
whole model (errors of different layers are independent to first order):

- ``kl``: mean KL divergence of the model's predictions with this layer alone quantized, from those without, in nats.
  One pass through the rest of the model for each layer and candidate.
- ``fisher``: the second-order estimate of the same number, 1/2 · mean over tokens of (g · e)². e is the error of the
  layer's output at a token and g the gradient of the log-likelihood of targets drawn from the model's predictions
  (so that the mean of g gᵀ is the Fisher information). One backward pass in all; tokens are taken as independent.
- ``error``: relative squared error of the layer's output, Σ |e|² / Σ |y|². No gradient; weighs layers alike, so it
  ranks formats within a layer better than layers among each other.

Source: the Fisher approximation as in optimal brain surgeon (Hassibi and Stork 1992) and SqueezeLLM, arXiv:2306.07629.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microscale.algorithms.contract import Progress
from microscale.errors import AllocationError, nearest
from microscale.evaluation.fidelity import divergence
from microscale.families.batch import Batch
from microscale.families.running import predict
from microscale.layerwise.blocks import removed_after, replaced_forward
from microscale.layerwise.returned import Returned
from microscale.nn.packed import PackedModule

Layers = Mapping[str, Sequence[nn.Module | None]]
"""By the name of a layer: its stand-in for each candidate, None where the candidate leaves it alone."""


class Sensitivity(Enum):
    """What is measured."""

    KL = "kl"
    FISHER = "fisher"
    ERROR = "error"


def parse_sensitivity(word: str) -> Sensitivity:
    """Return the measure of a word.

    Raises:
        AllocationError: another word.
    """
    words = [kind.value for kind in Sensitivity]
    if word not in words:
        raise AllocationError(f"unknown sensitivity {word!r}{nearest(word, words) or ';'} possible: {', '.join(words)}")
    return Sensitivity(word)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuringCost:
    """What measuring will take: passes through the whole model (a backward pass counts twice), over how many tokens."""

    passes: float
    tokens: int


def measuring_cost(kind: Sensitivity, layers: int, candidates: int, blocks: int, tokens: int) -> MeasuringCost:
    """Return what :func:`measure_sensitivity` will take.

    A pass of ``kl`` starts at the layer's own block; the other measures compute every layer once for each candidate.
    One more pass scores the unquantized model, but for ``error``, which predicts nothing.
    """
    if kind is Sensitivity.KL:
        return MeasuringCost(passes=2 + layers * candidates * (blocks + 1) / (2 * max(blocks, 1)), tokens=tokens)
    others = 3 if kind is Sensitivity.FISHER else 0
    return MeasuringCost(passes=1 + others + candidates, tokens=tokens)


def measure_sensitivity(
    model: Any,
    layers: Layers,
    blocks: Sequence[str],
    windows: Batch,
    kind: Sensitivity,
    *,
    seed: int = 0,
    progress: Progress,
) -> dict[str, list[float]]:
    """Return the sensitivity of each layer to each of its stand-ins; 0 where that is None.

    The model must be in float32 and stays as it is. ``blocks`` are the names of its decoder layers in order.

    Special values: a layer that no token reaches has sensitivity 0; NaN or Inf outputs give such a number.
    """
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    was_training = model.training
    model.eval()
    try:
        if kind is Sensitivity.KL:
            return _divergences(model, layers, blocks, windows, progress)
        return _output_errors(model, layers, windows, kind, seed, progress)
    finally:
        model.train(was_training)
        for parameter in frozen:
            parameter.requires_grad_(True)


class _Sums:
    """Running sums of one layer, a number for each candidate."""

    def __init__(self, count: int) -> None:
        self.weighted = [0.0] * count
        self.error = [0.0] * count
        self.power = 0.0


def _output_errors(
    model: Any, layers: Layers, windows: Batch, kind: Sensitivity, seed: int, progress: Progress
) -> dict[str, list[float]]:
    sums = {name: _Sums(len(stand_ins)) for name, stand_ins in layers.items()}
    generator = torch.Generator().manual_seed(seed)
    num_tokens = 0
    with contextlib.ExitStack() as stack:
        is_fisher = kind is Sensitivity.FISHER
        if is_fisher:
            handle = model.get_input_embeddings().register_forward_hook(_with_gradient)
            stack.enter_context(removed_after(handle))
        for name, stand_ins in layers.items():
            hook = _measuring(stand_ins, sums[name], is_fisher)
            stack.enter_context(removed_after(model.get_submodule(name).register_forward_hook(hook)))
        for index, window in enumerate(windows.split(1)):
            progress(index, len(windows), "windows")
            with torch.set_grad_enabled(is_fisher):
                logits = predict(model, window.to(model.device))[:, :-1]
                num_tokens += logits.shape[0] * logits.shape[1]
                if is_fisher:
                    _drawn_loss(logits, generator).backward()
    progress(len(windows), len(windows), "windows")
    if is_fisher:
        return {name: [value / 2 / num_tokens for value in each.weighted] for name, each in sums.items()}
    return {name: [value / each.power if each.power else 0.0 for value in each.error] for name, each in sums.items()}


def _with_gradient(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_()


def _drawn_loss(logits: Float[Tensor, "batch tokens vocabulary"], generator: torch.Generator) -> Float[Tensor, ""]:
    """Return the summed negative log-likelihood of targets drawn from the predictions themselves."""
    scores = torch.log_softmax(logits.to(torch.float32), dim=-1)
    rows = scores.detach().exp().flatten(0, 1).cpu()
    drawn = torch.multinomial(rows, 1, generator=generator).to(scores.device)
    return -scores.flatten(0, 1).gather(1, drawn).sum()


def _measuring(stand_ins: Sequence[nn.Module | None], sums: _Sums, is_fisher: bool) -> Callable[..., None]:
    def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs, wanted = arguments[0].detach(), output.detach()
        if not inputs.numel():
            return
        if not is_fisher:
            _add_errors(stand_ins, sums, inputs, wanted, None)
        elif output.requires_grad:
            output.register_hook(lambda gradient: _add_errors(stand_ins, sums, inputs, wanted, gradient))

    return hook


@torch.no_grad()
def _add_errors(
    stand_ins: Sequence[nn.Module | None], sums: _Sums, inputs: Tensor, wanted: Tensor, gradient: Tensor | None
) -> None:
    sums.power += _square_sum(wanted)
    for place, stand_in in enumerate(stand_ins):
        if stand_in is None:
            continue
        with _float_weight(stand_in):
            error = stand_in(inputs).to(wanted.dtype).sub_(wanted)
        sums.error[place] += _square_sum(error)
        if gradient is not None:
            sums.weighted[place] += _square_sum(torch.linalg.vecdot(gradient, error))


def _square_sum(values: Tensor) -> float:
    """Return the sum of squares; rows are summed in float32, which one pass over memory does."""
    return float(torch.linalg.vector_norm(values, dim=-1).to(torch.float64).square().sum())


@contextlib.contextmanager
def _float_weight(stand_in: nn.Module) -> Generator[None, None, None]:
    """Keep the float weight of a packed layer inside the block only: all of them at once would be whole models."""
    if not isinstance(stand_in, PackedModule):
        yield
        return
    stand_in.cache_weight()
    try:
        yield
    finally:
        stand_in.drop_cached_weight()


@torch.no_grad()
def _divergences(
    model: Any, layers: Layers, blocks: Sequence[str], windows: Batch, progress: Progress
) -> dict[str, list[float]]:
    totals = {name: [0.0] * len(stand_ins) for name, stand_ins in layers.items()}
    pieces = list(windows.split(4))
    num_steps, done, num_rows = len(pieces) * len(layers), 0, 0
    for piece in pieces:
        batch = piece.to(model.device)
        with _recorded(model, blocks) as inputs:
            reference = predict(model, batch)
        num_rows += reference.shape[0] * reference.shape[1]
        for name, stand_ins in layers.items():
            progress(done, num_steps, name)
            done += 1
            home = next((place for place, block in enumerate(blocks) if name.startswith(f"{block}.")), 0)
            before = _skipping(blocks, home, inputs)
            for place, stand_in in enumerate(stand_ins):
                if stand_in is None:
                    continue
                with _float_weight(stand_in), replaced_forward({**before, name: stand_in.forward}, model):
                    logits = predict(model, batch)
                totals[name][place] += float(divergence(reference, logits).sum())
    progress(num_steps, num_steps, "")
    return {name: [value / num_rows for value in values] for name, values in totals.items()}


@dataclass(slots=True)
class _BlockInputs:
    """What every decoder layer got in one pass, and what they return."""

    hidden: dict[str, Tensor]
    returned: Returned = field(default_factory=Returned)


@contextlib.contextmanager
def _recorded(model: nn.Module, blocks: Sequence[str]) -> Generator[_BlockInputs, None, None]:
    """Record the inputs of the decoder layers inside the block."""
    found = _BlockInputs(hidden={})

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: object) -> None:
            found.hidden[name] = arguments[0] if arguments else keywords["hidden_states"]
            found.returned = Returned.of(output)

        return hook

    with contextlib.ExitStack() as stack:
        for name in blocks:
            handle = model.get_submodule(name).register_forward_hook(hook_for(name), with_kwargs=True)
            stack.enter_context(removed_after(handle))
        yield found


def _skipping(blocks: Sequence[str], home: int, inputs: _BlockInputs) -> dict[str, Callable[..., Any]]:
    """Return stand-ins for the decoder layers before ``home``: the last gives what that one got."""
    if not home:
        return {}
    return dict.fromkeys(blocks[:home], inputs.returned.stand_in(inputs.hidden[blocks[home]]))
