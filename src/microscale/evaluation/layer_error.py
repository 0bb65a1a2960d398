"""Where a model departs from its reference: the error of every decoder layer's output.

Both models run on the same tokens, each on its own hidden states, so the error of a layer holds that of all layers
before it: it shows how error grows with depth and where it jumps. For layer outputs y (reference) and ŷ (model),

    relative error = Σ |ŷ − y|² / Σ |y|²,   SQNR = −10 · log10(relative error) decibels,
    token error    = mean over the tokens of |ŷ_t − y_t|² / |y_t|².

A few tokens with enormous hidden states (massive activations) decide the first alone; the second weighs every token
the same. The sums are float64 and streamed: what is kept at once are the layer outputs of one batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from microscale.errors import ModelError, ShapeError, TextError
from microscale.evaluation.perplexity import DEFAULT_BATCH, LanguageModel, batches, predictions_of
from microscale.families.look_up import block_names


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """Error of one decoder layer's output, over how many tokens (BOS included)."""

    name: str
    relative_error: float
    sqnr_db: float
    token_error: float
    tokens: int


@dataclass(slots=True)
class _Sums:
    error: float = 0.0
    power: float = 0.0
    ratio: float = 0.0
    tokens: int = 0

    def add(self, reference: Float[Tensor, "*batch hidden"], model: Float[Tensor, "*batch hidden"]) -> None:
        wanted = reference.reshape(-1, reference.shape[-1]).to(torch.float64)
        found = model.reshape(-1, model.shape[-1]).to(wanted.device, torch.float64)
        errors = (found - wanted).square().sum(-1)
        powers = wanted.square().sum(-1)
        self.error += float(errors.sum())
        self.power += float(powers.sum())
        self.ratio += float(torch.where(errors == 0, 0.0, errors / powers).sum())
        self.tokens += wanted.shape[0]

    def result(self, name: str) -> LayerError:
        relative = 0.0 if self.error == 0 else self.error / self.power if self.power else math.inf
        sqnr = math.inf if relative == 0 else -10.0 * math.log10(relative) if math.isfinite(relative) else -relative
        return LayerError(
            name=name, relative_error=relative, sqnr_db=sqnr, token_error=self.ratio / self.tokens, tokens=self.tokens
        )


@dataclass(slots=True)
class _Outputs:
    """What the layers of one forward call gave, by name."""

    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def decoder_layers(model: nn.Module) -> list[str]:
    """Return the dotted names of the decoder layers.

    Those of the family's record; of an unknown family, the members of the list of modules that holds most parameters.

    Raises:
        ModelError: an unknown family, and no list of modules.
    """
    known = block_names(model)
    if known:
        return list(known)
    best: tuple[int, list[str]] = (0, [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            size = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
            if size > best[0]:  # a list inside a layer comes later and holds less
                best = (size, [f"{name}.{place}" if name else str(place) for place in range(len(module))])
    if not best[1]:
        raise ModelError(f"{type(model).__name__} has no list of decoder layers whose outputs could be compared")
    return best[1]


def layer_errors(
    model: nn.Module,
    reference: nn.Module,
    windows: Sequence[Int[Tensor, "tokens"]],
    language_model: Callable[[nn.Module], LanguageModel],
    *,
    batch: int = DEFAULT_BATCH,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerError]:
    """Compare the output of each decoder layer of two models of one structure, in order of depth.

    Special values: equal outputs give error 0 and an SQNR of +Inf (also where the reference is all zero); NaN and Inf
    in either give NaN or Inf. A token whose reference is all zero while the model's is not makes the token error Inf.

    Raises:
        TextError: no windows.
        ModelError: a model without decoder layers.
        ShapeError: the models have different layers.
    """
    if not windows:
        raise TextError("there is no window to score; cut a text with make_windows")
    names, others = decoder_layers(reference), decoder_layers(model)
    if len(names) != len(others):
        raise ShapeError(f"the reference has {len(names)} decoder layers, the model {len(others)}; give its original")
    sums = {name: _Sums() for name in names}
    done = 0
    sides = language_model(reference), language_model(model)
    for group in batches(windows, batch):
        with torch.inference_mode():
            with _recording(reference, names) as wanted:
                predictions_of(sides[0], group)
            with _recording(model, others) as found:
                predictions_of(sides[1], group)
        for name, other in zip(names, others, strict=True):
            _check_shapes(name, wanted.tensors[name], found.tensors[other])
            sums[name].add(wanted.tensors.pop(name), found.tensors.pop(other))
        done += len(group)
        progress(done, len(windows))
    return [sums[name].result(name) for name in names]


def _check_shapes(name: str, wanted: Tensor, found: Tensor) -> None:
    if wanted.shape != found.shape:
        raise ShapeError(
            f"output of {name}: {tuple(wanted.shape)} in the reference, {tuple(found.shape)} in the model;"
            " give the model's original"
        )


@contextlib.contextmanager
def _recording(model: nn.Module, names: Sequence[str]) -> Generator[_Outputs, None, None]:
    """Record the outputs of the named layers inside the block; what a later layer writes in place is not seen."""
    outputs = _Outputs()

    def hook_for(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not isinstance(first, Tensor):
                raise ModelError(f"{name} returns a {type(first).__name__}, not hidden states")
            outputs.tensors[name] = first.detach().clone()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
