"""Inputs of linear layers while a decoder layer runs: statistics of all batches, and where a batch is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import microscale
from microscale.calibration.statistics import Wanted
from microscale.errors import NonFiniteError
from microscale.families.batch import Batch
from microscale.layerwise.blocks import BlockRunner
from microscale.layerwise.measuring import measure_inputs
from small_models import save_random_model

TOKENS = torch.randint(0, 256, (3, 10), generator=torch.Generator().manual_seed(1))
NAMES = ["model.layers.0", "model.layers.1"]
Q, UP, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return microscale.load(save_random_model(tmp_path / "model"), dtype=torch.float32)


def measured(model: Any, *names: str, hidden: list[Tensor] | None = None, wanted: Wanted = Wanted.ALL) -> Any:
    runner = BlockRunner(model, NAMES, Batch(token_ids=TOKENS), batch=2)
    linears = {name: model.get_submodule(name) for name in names}
    rows = list(runner.embedded()) if hidden is None else hidden
    return measure_inputs(runner, 0, linears, rows, wanted=wanted, seed=0)


def test_statistics_are_those_of_all_tokens(model: Any) -> None:
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
        for name in (Q, DOWN)
    ]
    with torch.no_grad():
        model(input_ids=TOKENS)
    for handle in handles:
        handle.remove()
    found = measured(model, Q, DOWN)
    assert list(found) == [Q, DOWN]
    for name in (Q, DOWN):
        rows = seen[name].double().flatten(0, 1)
        assert (found[name].name, found[name].num_tokens, found[name].cols) == (name, 30, rows.shape[1])
        torch.testing.assert_close(found[name].amax.double(), rows.abs().amax(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[name].mean.double(), rows.mean(0), rtol=1e-3, atol=1e-6)
        second = rows.T @ rows / 30
        torch.testing.assert_close(found[name].second_moment.double(), second, rtol=1e-3, atol=1e-5)


def test_what_was_not_wanted_is_not_there(model: Any) -> None:
    found = measured(model, UP, wanted=Wanted.RANGE)[UP]
    assert found.mean is None and found.second_moment is None and found.sample is None and found.amax.max() > 0


def test_a_batch_is_left_as_soon_as_every_layer_has_its_input(model: Any) -> None:
    calls: list[str] = []
    block = model.model.layers[0]
    for part in (block.self_attn.o_proj, block.mlp.up_proj, block.mlp.down_proj):
        part.register_forward_hook(lambda module, *_: calls.append(f"{module.in_features}x{module.out_features}"))
    measured(model, Q, UP)
    once = ["64x64", "64x96", "96x64"]  # the runner sees what kind of value a layer returns
    assert calls == [*once, "64x64", "64x64"]  # two batches; the input of up_proj ends each
    assert not block.self_attn.q_proj._forward_pre_hooks


def test_nan_is_refused_by_name_and_no_hook_stays(model: Any) -> None:
    hidden = torch.zeros(2, 10, 64)
    hidden[1, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=Q.replace(".", r"\.")):
        measured(model, Q, hidden=[hidden])
    assert not model.get_submodule(Q)._forward_pre_hooks
