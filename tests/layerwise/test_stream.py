"""The flows between decoder layers: what each layer is fed, what it learns from, and where a job goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.calibration.cache import ActivationStore
from microscale.errors import CalibrationError
from microscale.layerwise.stream import Flow, LayerStream, StoredBatches


class Layers:
    """Stands for the runner of a model: layer i multiplies by its factor, which quantizing changes."""

    num_batches = 2
    home = device = torch.device("cpu")

    def __init__(self) -> None:
        self.factors = [2.0, 3.0, 5.0]

    def embedded(self) -> Iterator[Tensor]:
        return iter([torch.full((2, 3, 4), 1.0), torch.full((1, 3, 4), -1.0)])

    def run(self, index: int, hidden: Tensor, *, batch: int) -> Tensor:
        return hidden * self.factors[index]


def values(batches: Any) -> list[float]:
    return [float(batch.flatten()[0]) for batch in batches]


def stream_of(layers: Any, store: ActivationStore, flow: Flow) -> LayerStream:
    return LayerStream(layers, store, flow, 3)


@pytest.mark.parametrize("is_on_disk", [False, True])
@pytest.mark.parametrize(
    ("flow", "inputs", "targets"),
    [
        (Flow.QUANTIZED, [1.0, 20.0, 600.0], None),  # by layers with factors 20, 30, 50
        (Flow.EXACT, [1.0, 2.0, 6.0], [2.0, 6.0, 30.0]),
        (Flow.TARGETS, [1.0, 20.0, 600.0], [2.0, 6.0, 30.0]),
    ],
)
def test_flows(flow: Flow, inputs: list[float], targets: list[float] | None, is_on_disk: bool, tmp_path: Path) -> None:
    layers, store = Layers(), ActivationStore(tmp_path if is_on_disk else None, "job")
    stream = stream_of(layers, store, flow)
    stream.start()
    for place in range(3):
        assert values(stream.inputs(place)) == [inputs[place], -inputs[place]]
        found = stream.targets(place)
        assert values(found) == ([] if targets is None else [targets[place], -targets[place]])
        layers.factors[place] *= 10  # the layer is quantized
        stream.advance(place)
        stream.finish(place)
    assert [store.num_batches(place) for place in range(4)] == [0, 0, 0, 0]


def test_a_job_goes_on_behind_the_layer_that_is_done(tmp_path: Path) -> None:
    layers, store = Layers(), ActivationStore(tmp_path, "job")
    stream = stream_of(layers, store, Flow.TARGETS)
    stream.start()
    assert store.last_complete_layer() == 0
    stream.targets(0)
    layers.factors[0] = 7.0
    stream.advance(0)
    stream.finish(0)
    again = ActivationStore(tmp_path, "job")
    assert again.last_complete_layer() == 1 and again.num_batches(1) == 4  # both flows
    resumed = stream_of(layers, again, Flow.TARGETS)
    assert values(resumed.inputs(1)) == [7.0, -7.0] and values(resumed.targets(1)) == [6.0, -6.0]


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_stored_batches_are_a_sequence(is_on_disk: bool, tmp_path: Path) -> None:
    store = ActivationStore(tmp_path if is_on_disk else None, "job")
    for place in range(5):
        store.put(3, place, torch.full((1, 2), float(place)))
    batches = StoredBatches(store, 3, 1, 3, torch.device("cpu"))
    assert len(batches) == 3 and values(batches) == [1.0, 2.0, 3.0]
    assert values(batches[1:]) == [2.0, 3.0] and values([batches[0], batches[-1]]) == [1.0, 3.0]
    assert values(reversed(batches)) == [3.0, 2.0, 1.0]
    with pytest.raises(IndexError):
        batches[3]
    store.drop(3)
    with pytest.raises(CalibrationError):
        batches[0]


def test_batches_from_disk_may_be_changed(tmp_path: Path) -> None:
    """Each reading is a tensor of its own."""
    store = ActivationStore(tmp_path, "job")
    store.put(0, 0, torch.ones(2, 2))
    batches = StoredBatches(store, 0, 0, 1, torch.device("cpu"))
    batches[0].zero_()
    assert torch.equal(batches[0], torch.ones(2, 2))
