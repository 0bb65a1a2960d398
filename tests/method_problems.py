"""Tasks for methods: random layers, groups, a decoder layer and a small model, with outliers in some channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from microscale.algorithms.contract import (
    BlockProblem,
    GroupProblem,
    LayerFunction,
    LayerProblem,
    ModelProblem,
    RotationProblem,
    as_it_is,
)
from microscale.calibration.statistics import InputStatistics, StatisticsCollector, Wanted
from microscale.families.batch import Batch
from microscale.formats import parse_activation, parse_format
from microscale.recipes.folding import keep_mean

COLS = 64


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def input_rows(tokens: int = 192, cols: int = COLS, seed: int = 1) -> Tensor:
    """Return correlated inputs; in every block of 32 channels one is much larger than the others."""
    mixing = torch.eye(cols) + 0.3 * random(cols, cols, seed=seed + 100) / cols**0.5
    rows = random(tokens, cols, seed=seed) @ mixing
    rows[:, 3::32] *= 12.0
    return rows


def statistics(rows: Tensor, name: str = "the layer") -> InputStatistics:
    """Measure everything about inputs."""
    collector = StatisticsCollector(rows.shape[1], wanted=Wanted.ALL, name=name)
    collector.update(rows)
    return collector.result()


def layer_problem(
    fmt: str = "mxfp4",
    activations: str | None = "mxfp4",
    *,
    rows: int = 48,
    cols: int = COLS,
    seed: int = 0,
    inputs: Tensor | None = None,
    name: str = "layers.0.up",
) -> LayerProblem:
    """Return a random layer with the statistics of its inputs."""
    return LayerProblem(
        name=name,
        weight=random(rows, cols, seed=seed) * 0.1,
        format=parse_format(fmt),
        activations=None if activations is None else parse_activation(activations),
        dtype=torch.float32,
        inputs=statistics(input_rows(cols=cols) if inputs is None else inputs, name),
    )


def group_problem(*layers: LayerProblem, role: str = "mlp.gate_up") -> GroupProblem:
    """Return layers as a group; without any, two random ones."""
    chosen = layers or (layer_problem(seed=0, name="layers.0.gate"), layer_problem(seed=1, name="layers.0.up"))
    return GroupProblem(role=role, layers=tuple(chosen), inputs=chosen[0].inputs)


def exact(layer: LayerProblem, bias: Tensor | None = None) -> LayerFunction:
    """Return what a layer computes without any rounding."""
    return lambda x: functional.linear(x, layer.weight, bias)


def silent(done: int, total: int, what: str) -> None:
    """Report nothing."""
    del done, total, what


def block_problem(
    fmt: str = "mxfp4", activations: str | None = "mxfp4", *, batches: int = 3, width: int = COLS, seed: int = 0
) -> BlockProblem:
    """Return a gated feed-forward layer with a residual as a decoder layer."""
    inner = 96
    gate = layer_problem(fmt, activations, rows=inner, cols=width, seed=seed, name="layers.0.gate")
    up = layer_problem(fmt, activations, rows=inner, cols=width, seed=seed + 1, name="layers.0.up")
    hidden = [input_rows(64, width, seed=seed + 10 + i).unsqueeze(0) for i in range(batches)]
    middle = functional.silu(hidden[0] @ gate.weight.T) * (hidden[0] @ up.weight.T)
    down = layer_problem(
        fmt, activations, rows=width, cols=inner, seed=seed + 2, inputs=middle.flatten(0, 1), name="layers.0.down"
    )
    biases: dict[str, Tensor | None] = {gate.name: None, up.name: None, down.name: random(width, seed=seed + 3) * 0.1}

    def forward(stand_ins: Mapping[str, LayerFunction], batch: int) -> Tensor:
        used = {
            problem.name: stand_ins.get(problem.name, exact(problem, biases[problem.name]))
            for problem in (gate, up, down)
        }
        x = hidden[batch]
        return x + used[down.name](functional.silu(used[gate.name](x)) * used[up.name](x))

    return BlockProblem(
        groups=(group_problem(gate, up), group_problem(down, role="mlp.down")),
        forward=forward,
        targets=[forward({}, i) for i in range(batches)],
        biases=biases,
        seed=seed,
        progress=silent,
    )


def model_problem(fmt: str = "mxfp4", activations: str | None = "mxfp4", *, seed: int = 0) -> ModelProblem:
    """Return an embedding, the layer of :func:`block_problem` and a head as a model of 48 words."""
    first = layer_problem(fmt, activations, rows=COLS, seed=seed, name="layers.0.mix")
    embedding = input_rows(48, seed=seed + 20)
    head = random(48, COLS, seed=seed + 21) * 0.2

    def logits(stand_ins: Mapping[str, LayerFunction], batch: Batch) -> Tensor:
        x = functional.embedding(batch.token_ids, embedding)
        return (torch.tanh(stand_ins.get(first.name, exact(first))(x))) @ head.T

    windows = torch.randint(0, 48, (6, 16), generator=torch.Generator().manual_seed(seed))
    return ModelProblem(
        groups=(group_problem(first, role="mlp.mix"),),
        logits=logits,
        windows=Batch(token_ids=windows),
        biases={first.name: None},
        seed=seed,
        progress=silent,
    )


def rotation_problem(*, keeps_mean: bool = False) -> RotationProblem:
    """Return the stream of :func:`model_problem` to rotate, with one layer that reads it."""
    return RotationProblem(
        size=COLS,
        readers=frozenset({"layers.0.mix"}),
        writers=frozenset(),
        keeps_mean=keeps_mean,
        admissible=keep_mean if keeps_mean else as_it_is,
        model=model_problem(),
    )


def check_orthogonal(turn: Tensor) -> None:
    """Check that a matrix is a rotation."""
    wide = turn.to(torch.float64)
    assert float((wide.T @ wide - torch.eye(len(wide), dtype=torch.float64)).abs().max()) < 1e-5


def tensors_of(value: Any) -> list[Tensor]:
    """Return every tensor in a record, and in the records in it."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_of(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for field in dataclasses.fields(value) for t in tensors_of(getattr(value, field.name, None))]
    return []
