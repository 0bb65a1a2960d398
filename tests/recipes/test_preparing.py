"""What happens to a decoder layer before it is rounded: measured, folded, transformed, cut, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from family_models import family_model, run
from microscale.algorithms.pipeline import parse_method
from microscale.calibration.statistics import Wanted
from microscale.families.batch import Batch
from microscale.families.look_up import describe
from microscale.layerwise.blocks import BlockRunner
from microscale.recipes.apply import QuantizationReport, quantize_model
from microscale.recipes.calibration import Calibration, ChannelOrder
from microscale.recipes.plan import make_plan
from microscale.recipes.preparing import ActiveBlock, Preparer
from microscale.recipes.problem_book import ProblemBook
from microscale.recipes.recipe import make_recipe
from microscale.transforms import TransformKind

WINDOWS = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(1))


def apply(model: Any, method: str, **recipe: Any) -> QuantizationReport:
    return quantize_model(
        model, make_recipe(method=method, **recipe), calibration=Calibration(windows=WINDOWS, batch=2)
    )


class Work:
    """The first decoder layer of a model with what a chain needs to prepare it."""

    def __init__(self, family: str, method: str, *, with_text: bool = True) -> None:
        self.model: Any = family_model(family, dtype=torch.float32)
        self.chain = parse_method(method)
        layers = {layer.name: layer for layer in make_plan(self.model, make_recipe(format="mxint8")).layers}
        self.book = ProblemBook(self.model, layers, dict.fromkeys(layers, self.chain))
        self.preparer = Preparer(self.model, self.book, lambda *_: None, 0, ChannelOrder.FOLDED)
        structure = describe(self.model)
        names = [block.name for block in structure.blocks]
        runner = BlockRunner(self.model, names, Batch(token_ids=WINDOWS), batch=2) if with_text else None
        hidden: list[Tensor] = [] if runner is None else list(runner.embedded())
        self.block = ActiveBlock(index=0, structure=structure.blocks[0], runner=runner, hidden=hidden, targets=())


def test_scales_without_a_place_are_said() -> None:
    """Online scales of a family that folds most, experts behind one norm, and a head that a rotation unties."""
    report = apply(family_model("gpt2", dtype=torch.float32), "smoothquant", format="mxint8")
    assert any(
        "smoothquant keeps its scales online for 2 layers, e.g. transformer.h.0.mlp.c_proj" in note
        for note in report.plan.notes
    )
    report = apply(family_model("mixtral", dtype=torch.float32), "awq", format="mxint8")
    assert any("awq leaves" in note and "experts read one norm" in note for note in report.plan.notes)
    report = apply(family_model("llama", dtype=torch.float32), "smoothquant", format="mxint8")
    assert report.plan.notes == ()
    for family, is_tied in (("llama", False), ("llama-biases-tied", True)):
        notes = apply(family_model(family, dtype=torch.float32), "quarot", format="mxint8").plan.notes
        assert any("head, which was tied, gets a weight of its own" in note for note in notes) == is_tied


@torch.no_grad()
def test_inputs_of_a_group_are_those_that_its_layers_get() -> None:
    work = Work("llama", "awq+rtn")
    inputs: list[Tensor] = []
    module = work.model.get_submodule(f"{work.block.structure.name}.mlp.down_proj")
    hook = module.register_forward_hook(lambda _, given, __: inputs.append(given[0]))
    run(work.model, {"input_ids": WINDOWS})
    hook.remove()
    groups = [group for group in work.block.structure.groups if group.role == "mlp.down"]
    (found,) = work.preparer.measure(work.block, groups, [None, Wanted.RANGE]).values()
    assert found.num_tokens == WINDOWS.numel()
    torch.testing.assert_close(found.amax.float(), inputs[0].flatten(0, 1).abs().amax(0), rtol=1e-5, atol=1e-6)


def test_nothing_is_measured_where_nothing_is_wanted_or_there_is_no_text() -> None:
    work = Work("llama", "awq+rtn")
    assert work.preparer.measure(work.block, work.block.structure.groups, [None]) == {}
    assert work.preparer.measure(work.block, [], [Wanted.RANGE]) == {}
    blind = Work("llama", "awq+rtn", with_text=False)
    assert blind.preparer.measure(blind.block, blind.block.structure.groups, [Wanted.RANGE]) == {}
    blind.preparer.find(blind.block, blind.chain)
    assert all(blind.book.problem(name).transforms == () for name in blind.book.layers), "no token came by"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folded_scales_leave_the_model_as_it_was(family: str) -> None:
    """What is folded into a norm stays in its weight; what finds no place is kept online and noted."""
    work = Work(family, "smoothquant")
    expected = run(work.model)
    before = {name: work.book.problem(name).weight.clone() for name in work.book.layers}
    work.preparer.find(work.block, work.chain)
    online = {name for name in before if work.book.problem(name).transforms}
    inside = {name for name in before if name.startswith(f"{work.block.structure.name}.")}
    assert online == ({f"{work.block.structure.name}.mlp.c_proj"} if family == "gpt2" else set())
    changed = {name for name in before if not torch.equal(work.book.problem(name).weight, before[name])}
    assert changed <= inside and changed
    assert [note.partition(":")[0] for note in work.preparer.notes] == [
        f"smoothquant keeps its scales online for 1 layer, e.g. {name}" for name in online
    ]
    torch.testing.assert_close(run(work.model), expected, rtol=1e-4, atol=1e-4)


def test_transforms_are_found_for_every_group_without_text_where_they_need_none() -> None:
    work = Work("llama", "hadamard+rtn", with_text=False)
    work.preparer.find(work.block, work.chain)
    for name in work.book.layers:
        kinds = [transform.spec.kind for transform in work.book.problem(name).transforms]
        is_inside = name.startswith(f"{work.block.structure.name}.")
        assert kinds == ([TransformKind.HADAMARD] if is_inside else []), name


def test_a_chain_without_learning_learns_nothing() -> None:
    work = Work("llama", "gptq", with_text=False)
    work.preparer.learn(work.block, work.chain)
    assert work.preparer.notes == []
