"""What is known of each layer until it is rounded: kept, refreshed, grouped by chain, and dropped."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from family_models import family_model
from method_problems import input_rows, statistics
from microscale.algorithms.pipeline import parse_method
from microscale.families.look_up import describe
from microscale.recipes.plan import make_plan
from microscale.recipes.problem_book import ProblemBook
from microscale.recipes.problems import transformed
from microscale.recipes.recipe import make_recipe
from microscale.transforms import permute_transform, scale_transform

GPTQ, RTN = parse_method("gptq"), parse_method("rtn")


def book_of(model: Any, *, narrow: tuple[str, ...] = (), **recipe: Any) -> ProblemBook:
    """A book in which layers whose names end so have a chain of their own."""
    layers = {layer.name: layer for layer in make_plan(model, make_recipe(format="mxfp4", **recipe)).layers}
    return ProblemBook(model, layers, {name: RTN if name.endswith(narrow) and narrow else GPTQ for name in layers})


@pytest.fixture
def model() -> Any:
    return family_model("llama-biases-tied", dtype=torch.float32)


def test_a_layer_is_as_planned_until_it_is_kept(model: Any) -> None:
    book = book_of(model)
    name = next(iter(book.layers))
    planned = book.problem(name)
    assert torch.equal(planned.weight, model.get_submodule(name).weight) and planned.transforms == ()
    (_, group), *_ = book.groups(describe(model).blocks[0], GPTQ)
    scaled = transformed(group, [scale_transform(torch.full((32,), 2.0))])
    known = dataclasses.replace(scaled.layers[0], inputs=statistics(input_rows(tokens=4, cols=32)))
    book.keep(dataclasses.replace(scaled, layers=(known, *scaled.layers[1:])))
    kept = book.problem(known.name)
    assert kept.transforms == known.transforms and kept.inputs is None, "what was measured is not kept"
    book.drop(known.name)
    book.drop(known.name)
    assert book.problem(known.name).transforms == ()


def test_layers_of_one_group_with_other_chains_are_groups_of_their_own(model: Any) -> None:
    book = book_of(model, narrow=("k_proj",))
    block = describe(model).blocks[0]
    assert [pipeline.text for pipeline in book.distinct] == [GPTQ.text, RTN.text]
    with_gptq = {group.role: [layer.name for layer in group.layers] for _, group in book.groups(block, GPTQ)}
    assert [name.rpartition(".")[2] for name in with_gptq["attention.qkv"]] == ["q_proj", "v_proj"]
    assert [[layer.name for layer in group.layers] for _, group in book.groups(block, RTN)] == [
        [f"{block.name}.self_attn.k_proj"]
    ]


def test_layers_that_are_left_alone_are_in_no_group(model: Any) -> None:
    book = book_of(model, exclude=("*.gate_proj", "mlp.down"))
    block = describe(model).blocks[0]
    found = {group.role: [layer.name for layer in problem.layers] for group, problem in book.groups(block, GPTQ)}
    assert set(found) == {"attention.qkv", "attention.out", "mlp.gate_up"}
    assert found["mlp.gate_up"] == [f"{block.name}.mlp.up_proj"]
    gate_up = next(group for group in block.groups if group.role == "mlp.gate_up")
    assert book.chosen(block, gate_up) == [f"{block.name}.mlp.up_proj"]


def test_an_order_is_folded_only_where_all_layers_take_it_and_none_mixes_channels(model: Any) -> None:
    block = describe(model).blocks[0]

    def is_folded(book: ProblemBook, role: str) -> bool:
        return next(problem.is_order_folded for group, problem in book.groups(block, GPTQ) if group.role == role)

    whole = book_of(model)
    assert is_folded(whole, "mlp.down")
    assert not is_folded(book_of(model, exclude=("*.v_proj",)), "attention.qkv")
    (problem,) = (problem for group, problem in whole.groups(block, GPTQ) if group.role == "mlp.down")
    whole.keep(transformed(problem, [permute_transform(torch.arange(47, -1, -1))]))
    assert not is_folded(whole, "mlp.down"), "it is in an order already"


def test_weights_are_taken_again_after_a_fold(model: Any) -> None:
    book = book_of(model)
    block = describe(model).blocks[0]
    for _, problem in book.groups(block, GPTQ):
        book.keep(problem)
    name = f"{block.name}.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(name).weight.copy_(model.get_submodule(name).weight * 3)
    kept = book.problem(name).weight.clone()
    book.refresh(block)
    assert torch.equal(book.problem(name).weight, model.get_submodule(name).weight)
    assert kept.shape == book.problem(name).weight.shape


def test_biases_by_the_names_of_layers(model: Any) -> None:
    book = book_of(model)
    block = describe(model).blocks[0]
    problems = [problem for _, problem in book.groups(block, GPTQ)]
    found = book.biases(problems)
    assert list(found) == [layer.name for problem in problems for layer in problem.layers]
    for name, bias in found.items():
        assert bias is not None and torch.equal(bias, model.get_submodule(name).bias) and not bias.requires_grad
    without = family_model("llama", dtype=torch.float32)
    other = book_of(without)
    assert set(other.biases([problem for _, problem in other.groups(describe(without).blocks[0], GPTQ)]).values()) == {
        None
    }
