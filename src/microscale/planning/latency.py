"""How long one layer takes in one format on this machine: a table by shape and candidate, measured on the spot."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from microscale.kernels import preferred_layout
from microscale.layerwise.devices import device_of, wait_for
from microscale.nn.linear import QuantizedLinear
from microscale.nn.packed import PackedModule

REPEATS = 7
SHORTEST_SECONDS = 0.005
"""A repeat calls the layer as often as takes this long, so that the clock's grain does not show."""


def measure_latencies(
    layers: Mapping[str, Sequence[nn.Module | None]],
    originals: Mapping[str, nn.Module],
    *,
    tokens: int,
    progress: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> dict[str, list[float]]:
    """Return the milliseconds of each layer in each candidate for an input of ``tokens`` rows, median of repeats.

    Layers of one shape, format and activation setting are measured once. Where a candidate leaves a layer alone its
    original is measured, in float32. Packed weights are laid out as they would run.
    """
    table: dict[tuple[object, ...], float] = {}
    found: dict[str, list[float]] = {}
    for index, (name, stand_ins) in enumerate(layers.items()):
        progress(index, len(layers), name)
        found[name] = []
        for stand_in in stand_ins:
            module = originals[name] if stand_in is None else stand_in
            key = _key(module)
            if key not in table:
                table[key] = _milliseconds(module, tokens)
            found[name].append(table[key])
    progress(len(layers), len(layers), "")
    return found


def _key(module: nn.Module) -> tuple[object, ...]:
    if not isinstance(module, PackedModule):
        return (type(module), *module.get_parameter("weight").shape)
    acts = module.activations if isinstance(module, QuantizedLinear) else None
    transforms = module.transforms is not None if isinstance(module, QuantizedLinear) else False
    return (module.kind, module.shape, module.format, None if acts is None else acts.spec, transforms)


@torch.no_grad()
def _milliseconds(module: nn.Module, tokens: int) -> float:
    before = None
    if isinstance(module, QuantizedLinear):
        before = module.layout
        module.set_layout(preferred_layout(module.tensor, torch.float32))
    device = device_of(module)
    inputs = _inputs(module, tokens).to(device)
    module(inputs)
    wait_for(device)
    started = time.perf_counter()
    module(inputs)
    wait_for(device)
    calls = max(1, round(SHORTEST_SECONDS / max(time.perf_counter() - started, 1e-9)))
    times: list[float] = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(calls):
            module(inputs)
        wait_for(device)
        times.append((time.perf_counter() - started) / calls)
    if before is not None and isinstance(module, QuantizedLinear):
        module.set_layout(before)
    return 1e3 * statistics.median(times)


def _inputs(module: nn.Module, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    is_embedding = isinstance(module, nn.Embedding) or (isinstance(module, PackedModule) and module.kind == "embedding")
    shape = module.shape if isinstance(module, PackedModule) else module.get_parameter("weight").shape
    if is_embedding:
        return torch.randint(0, int(shape[0]), (tokens,), generator=generator)
    is_transposed = not isinstance(module, PackedModule | nn.Linear)
    return torch.randn(tokens, int(shape[0 if is_transposed else 1]), generator=generator)
