"""Records of structure: rows of a fused projection, and blocks by name. How models are described: test_look_up.py."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microscale.families.structure import BlockStructure, Fold, FoldKind, LinearGroup, ModelStructure, Rows, Signs


@pytest.mark.parametrize(
    ("rows", "indices"),
    [
        (Rows(start=4, heads=1, stride=3, width=3), (4, 5, 6)),
        (Rows(start=2, heads=2, stride=5, width=2), (2, 3, 7, 8)),
        (Rows(start=0, heads=3, stride=1, width=1), (0, 1, 2)),
        (Rows(start=7, heads=0, stride=2, width=2), ()),
    ],
)
def test_rows_one_by_one(rows: Rows, indices: tuple[int, ...]) -> None:
    assert rows.indices == indices


@given(heads=st.integers(1, 6), width=st.integers(1, 6))
def test_the_values_of_a_fused_projection(heads: int, width: int) -> None:
    """Each head has its query, key and value rows together: the third run of each."""
    weight = torch.arange(heads * 3 * width)
    rows = Rows(start=2 * width, heads=heads, stride=3 * width, width=width)
    assert weight[list(rows.indices)].tolist() == weight.reshape(heads, 3, width)[:, 2].flatten().tolist()


def model(*names: str) -> ModelStructure:
    """Return a structure with blocks of these names."""
    group = LinearGroup(role="mlp.down", linears=("down",))
    blocks = tuple(BlockStructure(name=name, groups=(group,)) for name in names)
    return ModelStructure(
        family="llama", is_known=True, blocks=blocks, embeddings=(), final_norm=None, head=None, part="language"
    )


def test_a_block_is_found_by_its_full_name() -> None:
    structure = model("layers.1", "layers.10", "layers.0")
    assert structure.block("layers.10") is structure.blocks[1]
    for name in ("layers", "layers.2", "", "1"):
        with pytest.raises(KeyError) as error:
            structure.block(name)
        assert error.value.args == (name,)
    with pytest.raises(KeyError):
        model().block("layers.0")


def test_records_are_equal_by_what_they_say_and_cannot_be_changed() -> None:
    one, other = (Fold(kind=FoldKind.NORM, name="norm", readers=("q", "k")) for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != dataclasses.replace(one, signs=Signs.POSITIVE) and one != dataclasses.replace(one, readers=("k", "q"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.name = "other"  # type: ignore[misc]
    assert model("a") == model("a") != model("b")
