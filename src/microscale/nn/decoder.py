"""Decoder: a whole model as a plan of operations over buffers and a key/value cache that are allocated once.

It computes in float32 what the modules of the model compute in float32 (:mod:`microscale.families.decoders` states the
structure): sums may be in another order, everything else is the same. One sequence at a time. The operations are bound
once (:mod:`microscale.kernels.plan`): on a compiled backend a step of one token makes eight prepared calls for each
layer and allocates nothing; a prompt goes through the same calls in chunks of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from microscale.errors import ShapeError, counted
from microscale.formats import Format
from microscale.kernels import BoundPlan, Gate, KeyValueCache, Rotation, bind, make_cache
from microscale.kernels.backend import Call, PlanStep
from microscale.kernels.decoder_ops import add_rms_norm, attend, store_heads
from microscale.nn.decoder_linear import Execution, LinearCalls, rows_stand_alone
from microscale.nn.embedding import NarrowEmbedding, QuantizedEmbedding
from microscale.nn.linear import QuantizedLinear

DEFAULT_CHUNK = 512
"""Tokens of a prompt that are computed at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """An RMSNorm: float32 weight and epsilon."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """The modules of one layer; ``window`` is how many positions a query sees (None: all before it)."""

    input_norm: Norm
    query: nn.Module
    key: nn.Module
    value: nn.Module
    query_norm: Norm | None
    key_norm: Norm | None
    output: nn.Module
    mlp_norm: Norm
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    window: int | None

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        """All linear layers."""
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderParts:
    """A model taken apart. ``rotary`` gives cosines and sines [positions, head_dim] of the first so many positions."""

    embedding: nn.Module
    layers: tuple[LayerParts, ...]
    final_norm: Norm
    head: nn.Module
    num_heads: int
    kv_heads: int
    head_dim: int
    gate: Gate
    rotary: Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """What of a layer is prepared for any number of rows."""

    parts: LayerParts
    heads: LinearCalls
    rotation: Rotation
    cache: KeyValueCache
    output: LinearCalls
    gated: LinearCalls
    down: LinearCalls


@dataclass(frozen=True, slots=True, kw_only=True)
class _Program:
    """The plans for a number of rows: ``body`` fills the cache, ``tail`` turns the last row into logits."""

    residual: Tensor
    body: BoundPlan
    tail: BoundPlan


class Decoder:
    """A decoder with room for ``positions`` tokens on the device of its norms; ``cache`` is what keys and values store.

    Raises:
        KernelError: no backend keeps such a cache.
    """

    def __init__(
        self,
        parts: DecoderParts,
        *,
        positions: int,
        cache: Format | torch.dtype = torch.float32,
        chunk: int = DEFAULT_CHUNK,
    ) -> None:
        self.positions = positions
        self.num_tokens = 0
        self._parts = parts
        self._device = parts.final_norm.weight.device
        self._length = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._layers = _make_layers(parts, positions, cache, self._length)
        self._head = LinearCalls([parts.head])
        self._logits = torch.empty(1, self._head.rows_out, device=self._device)
        self._chunk = chunk if _can_cut(parts) else positions
        self._table = _float_table(parts.embedding)
        self._decode = self._program(1)
        self._programs: dict[int, _Program] = {1: self._decode}

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step of one token reads: all linear layers and the head, as they lie in memory."""
        return sum(group.num_bytes for group in self._groups())

    @property
    def executions(self) -> Counter[Execution]:
        """How many linear layers run in which way."""
        return Counter(execution for group in self._groups() for execution in group.executions)

    def _groups(self) -> list[LinearCalls]:
        layers = [(layer.heads, layer.output, layer.gated, layer.down) for layer in self._layers]
        return [*(group for groups in layers for group in groups), self._head]

    @property
    def cache_bytes(self) -> int:
        """Bytes of the key/value cache."""
        return sum(layer.cache.num_bytes for layer in self._layers)

    def reset(self) -> None:
        """Begin a new sequence."""
        self.num_tokens = 0

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> Float[Tensor, "vocabulary"]:
        """Append tokens; returns the logits after the last one, in memory that the next call overwrites.

        Raises:
            ShapeError: no token, or more than there is room for.
        """
        if not tokens:
            raise ShapeError("a decoder needs at least one token")
        self._check_room(len(tokens))
        program = self._decode
        for begin in range(0, len(tokens), self._chunk):
            part = tokens[begin : begin + self._chunk]
            program = self._program_for(len(part))
            self._length.fill_(self.num_tokens)
            program.residual.copy_(self._look_up(part))
            program.body.run()
            self.num_tokens += len(part)
        program.tail.run()
        return self._logits[0]

    @torch.inference_mode()
    def step(self, token: int) -> Float[Tensor, "vocabulary"]:
        """Append one token; returns the logits after it, in memory that the next call overwrites.

        Raises:
            ShapeError: no room is left.
        """
        self._begin_step(token)
        self._decode.body.run()
        self._decode.tail.run()
        self.num_tokens += 1
        return self._logits[0]

    @torch.inference_mode()
    def timed_step(self, token: int) -> dict[str, float]:
        """Run :meth:`step` and return the seconds spent in each kind of call."""
        self._begin_step(token)
        seconds = Counter(self._decode.body.timed_run())
        seconds.update(self._decode.tail.timed_run())
        self.num_tokens += 1
        return dict(seconds)

    @property
    def plans(self) -> tuple[BoundPlan, BoundPlan]:
        """The plans of a step: through all layers, and from the last of them to the logits."""
        return self._decode.body, self._decode.tail

    def _begin_step(self, token: int) -> None:
        if self.num_tokens >= self.positions:
            self._check_room(1)
        self._length.fill_(self.num_tokens)
        row = self._look_up([token]) if self._table is None else self._table[token]
        self._decode.residual.copy_(row)

    def _check_room(self, count: int) -> None:
        if self.num_tokens + count > self.positions:
            raise ShapeError(
                f"{counted(count, 'more token')} after {self.num_tokens} exceed the decoder's"
                f" {counted(self.positions, 'position')}; make"
                " it with more, or reset it"
            )

    def _look_up(self, tokens: Sequence[int]) -> Tensor:
        indices = torch.tensor(tokens, device=self._device)
        embedding = self._parts.embedding
        if isinstance(embedding, QuantizedEmbedding):
            return embedding.rows(indices, torch.float32)
        assert self._table is not None
        return self._table[indices]

    def _program_for(self, rows: int) -> _Program:
        """Return the plans for so many rows; those of one row, of a chunk and of the last other number are kept."""
        if rows not in self._programs:
            kept = {each: self._programs[each] for each in (1, self._chunk) if each in self._programs}
            self._programs = kept | {rows: self._program(rows)}
        return self._programs[rows]

    def _program(self, rows: int) -> _Program:
        parts = self._parts
        hidden = parts.final_norm.weight.shape[0]
        residual, normed, delta = (self._buffer(rows, hidden) for _ in range(3))
        heads = self._buffer(rows, (parts.num_heads + 2 * parts.kv_heads) * parts.head_dim)
        attended = self._buffer(rows, parts.num_heads * parts.head_dim)
        gated = self._buffer(rows, self._layers[0].gated.rows_out)
        body: list[Call | PlanStep] = []
        for place, layer in enumerate(self._layers):
            norm, mlp_norm = layer.parts.input_norm, layer.parts.mlp_norm
            body.append(add_rms_norm(residual, delta if place else None, norm.weight, norm.eps, normed))
            body += layer.heads.calls(normed, heads)
            body.append(store_heads(heads, layer.cache, layer.rotation))
            body.append(attend(heads, layer.cache, attended, scale=parts.head_dim**-0.5, window=layer.parts.window))
            body += layer.output.calls(attended, delta)
            body.append(add_rms_norm(residual, delta, mlp_norm.weight, mlp_norm.eps, normed))
            body += layer.gated.calls(normed, gated)
            body += layer.down.calls(gated, delta)
        last, norm = slice(rows - 1, rows), parts.final_norm
        tail: list[Call | PlanStep] = [add_rms_norm(residual[last], delta[last], norm.weight, norm.eps, normed[last])]
        tail += self._head.calls(normed[last], self._logits)
        return _Program(residual=residual, body=bind(body), tail=bind(tail))

    def _buffer(self, rows: int, cols: int) -> Float[Tensor, "rows cols"]:
        return torch.empty(rows, cols, device=self._device)


def _make_layers(parts: DecoderParts, positions: int, stored: Format | torch.dtype, length: Tensor) -> list[_Layer]:
    layers: list[_Layer] = []
    tables: tuple[Tensor, Tensor] | None = None
    for layer in parts.layers:
        cache = make_cache(stored, positions=positions, kv_heads=parts.kv_heads, head_dim=parts.head_dim, length=length)
        tables = tables or parts.rotary(cache.capacity)
        rotation = Rotation(
            cosines=tables[0],
            sines=tables[1],
            query_norm=None if layer.query_norm is None else layer.query_norm.weight,
            key_norm=None if layer.key_norm is None else layer.key_norm.weight,
            eps=0.0 if layer.query_norm is None else layer.query_norm.eps,
        )
        layers.append(
            _Layer(
                parts=layer,
                heads=LinearCalls([layer.query, layer.key, layer.value]),
                rotation=rotation,
                cache=cache,
                output=LinearCalls([layer.output]),
                gated=LinearCalls([layer.gate, layer.up], parts.gate),
                down=LinearCalls([layer.down]),
            )
        )
    return layers


def _can_cut(parts: DecoderParts) -> bool:
    """Whether chunks of a prompt give what the whole gives: no scale that spans tokens, no range with memory."""
    linears = [*(linear for layer in parts.layers for linear in layer.linears), parts.head]
    specs = [
        module.activations.spec
        for module in linears
        if isinstance(module, QuantizedLinear) and module.activations is not None
    ]
    return all(rows_stand_alone(spec.format) and not spec.num_ranges for spec in specs)


def _float_table(embedding: nn.Module) -> Tensor | None:
    return embedding.weight.detach() if isinstance(embedding, nn.Embedding | NarrowEmbedding) else None
