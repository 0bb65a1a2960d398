"""The residual stream rotated as a step says: what it is asked, and that the model computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from family_models import family_model, run
from microscale.algorithms.contract import RotationProblem, RotationStep
from microscale.errors import ModelError
from microscale.families.look_up import describe
from microscale.recipes.apply import quantize_model
from microscale.recipes.folding import centre_residual, fuse_norms, rotation_obstacle
from microscale.recipes.matrices import matrix
from microscale.recipes.recipe import make_recipe
from microscale.recipes.rotating import rotate_model

PROBLEMS: list[RotationProblem] = []
HEADS: list[tuple[int, int]] = []


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn(RotationStep):
    """Turns by a random matrix, and the heads too where asked."""

    turns_heads: bool = True

    def rotation(self, problem: RotationProblem) -> Tensor:
        assert torch.is_grad_enabled(), "a step may learn"
        PROBLEMS.append(problem)
        return problem.admissible(orthogonal(problem.size, 1))

    def head_rotation(self, size: int, index: int) -> Tensor | None:
        HEADS.append((size, index))
        return orthogonal(size, 10 + index) if self.turns_heads else None


@pytest.fixture(autouse=True)
def clean() -> None:
    PROBLEMS.clear()
    HEADS.clear()


def rotated(family: str, **options: Any) -> tuple[Any, Tensor]:
    model = family_model(family)
    before = run(model)
    structure = describe(model)
    with torch.no_grad():
        fuse_norms(model, structure)
        rotate_model(model, structure, Turn(**options), None)
    return model, before


@pytest.mark.parametrize("turns_heads", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama-biases-tied", "opt", "phi3"])
def test_the_logits_stay(family: str, turns_heads: bool) -> None:
    model, before = rotated(family, turns_heads=turns_heads)
    assert float((run(model) - before).abs().max() / before.abs().max()) < 1e-5
    original = family_model(family)
    entry = describe(original).entries[0]
    assert not torch.allclose(matrix(model, entry), matrix(original, entry)), "something was turned"


def test_what_a_step_is_asked() -> None:
    rotated("llama")
    (problem,) = PROBLEMS
    assert problem.size == 32 and problem.model is None and not problem.keeps_mean
    block = "model.layers.1."
    readers = {f"{block}self_attn.{name}_proj" for name in "qkv"} | {
        f"{block}mlp.{name}_proj" for name in ("gate", "up")
    }
    assert {name for name in problem.readers if name.startswith(block)} == readers
    assert {name for name in problem.writers if name.startswith(block)} == {
        f"{block}self_attn.o_proj",
        f"{block}mlp.down_proj",
    }
    assert HEADS == [(8, 0), (8, 1)], "the width of a head, block by block"


def test_a_layer_norm_wants_rotations_that_keep_the_mean() -> None:
    model = family_model("opt")
    before = run(model)
    structure = describe(model)
    with torch.no_grad():
        fuse_norms(model, structure)
        centre_residual(model, structure)
        rotate_model(model, structure, Turn(), None)
    (problem,) = PROBLEMS
    assert problem.keeps_mean
    kept = problem.admissible(orthogonal(problem.size, 1))
    ones = torch.ones(problem.size, dtype=torch.float64)
    torch.testing.assert_close(kept @ ones, ones)
    assert float((run(model) - before).abs().max() / before.abs().max()) < 1e-5


def test_a_stream_that_cannot_be_rotated_is_left_alone() -> None:
    model = family_model("gemma2")
    before = run(model)
    with pytest.raises(ModelError, match="cannot be rotated"):
        rotate_model(model, describe(model), Turn(), None)
    assert torch.equal(run(model), before) and not PROBLEMS


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt-after"])
def test_a_rotation_that_may_be_left_out(family: str) -> None:
    """Where `best` folds all into weights, a model that cannot be rotated is quantized all the same, with a note."""
    before, model = (family_model(family, dtype=torch.float32) for _ in range(2))
    obstacle = rotation_obstacle(describe(model))
    recipe = make_recipe(format="bf16/32:e8m0", method="blockrot:size=8+rtn")
    notes = quantize_model(model, recipe).plan.notes
    assert [note for note in notes if note.startswith("blockrot turns the values of attention alone")] == (
        [] if obstacle is None else [notes[-1]]
    )
    assert (obstacle is None) == (family == "llama") and (obstacle is None or obstacle in notes[-1])
    torch.testing.assert_close(run(model), run(before), rtol=0.05, atol=0.1)
    out = "model.decoder.layers.0.self_attn.out_proj" if "opt" in family else "model.layers.0.self_attn.o_proj"
    assert not torch.allclose(model.get_submodule(out).weight, before.get_submodule(out).weight, atol=1e-2)
