"""Measure the inputs of linear layers while a decoder layer runs on its batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from microscale.calibration.statistics import InputStatistics, StatisticsCollector, Wanted
from microscale.layerwise.blocks import BlockRunner, FoundError, removed_after
from microscale.nn.modules import float_weight


def measure_inputs(
    runner: BlockRunner,
    index: int,
    linears: Mapping[str, nn.Module],
    hidden: Sequence[Tensor],
    *,
    wanted: Wanted,
    seed: int,
) -> dict[str, InputStatistics]:
    """Run decoder layer ``index`` on ``hidden`` and return the statistics of the inputs of ``linears``, by their names.

    A batch is left as soon as every one of them has its input: what comes behind is not computed.
    """
    collectors: dict[str, StatisticsCollector] = {}
    waiting: set[str] = set()
    with contextlib.ExitStack() as stack:
        for name, module in linears.items():
            weight = float_weight(module)
            collector = StatisticsCollector(weight.shape[1], wanted=wanted, seed=seed, device=weight.device, name=name)
            collectors[name] = collector
            hook = _feeding(collector, name, waiting)
            stack.enter_context(removed_after(module.register_forward_pre_hook(hook)))
        for batch, states in enumerate(hidden):
            waiting.update(linears)
            with contextlib.suppress(FoundError), torch.no_grad():
                runner.run(index, states, batch=batch)
    return {name: collector.result() for name, collector in collectors.items()}


def _feeding(
    collector: StatisticsCollector, name: str, waiting: set[str]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def feed(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        collector.update(arguments[0].detach())
        waiting.discard(name)
        if not waiting:
            raise FoundError

    return feed
