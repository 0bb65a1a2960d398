"""What layers are for, in families and outside of them, and which patterns mean them."""

from __future__ import annotations

import pytest
from torch import nn

from family_models import family_model
from microscale.recipes.plan import quantizable_modules
from microscale.recipes.roles import is_meant, layer_roles, named_roles


@pytest.mark.parametrize(
    ("family", "roles"),
    [
        (
            "llama",
            {"q_proj": "attention.qkv", "o_proj": "attention.out", "up_proj": "mlp.gate_up", "down_proj": "mlp.down"},
        ),
        ("gpt2", {"c_attn": "attention.qkv", "c_fc": "mlp.up", "wte": "embedding", "lm_head": "lm_head"}),
    ],
)
def test_layers_have_the_roles_of_their_family(family: str, roles: dict[str, str]) -> None:
    model = family_model(family)
    found = layer_roles(model, quantizable_modules(model))
    assert set(found) == set(quantizable_modules(model)), "every module has one"
    for ending, role in roles.items():
        named = {found[name] for name in found if name.rpartition(".")[2] == ending}
        assert named == {role}, ending


def test_a_model_without_blocks_has_the_others_only() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    assert layer_roles(model, quantizable_modules(model)) == {"0": "embedding", "1": "other"}
    head = model[1]
    model.get_output_embeddings = lambda: head  # type: ignore[assignment]
    assert layer_roles(model, quantizable_modules(model))["1"] == "lm_head"


@pytest.mark.parametrize(
    ("pattern", "is_one"),
    [
        ("mlp.down", True),
        ("mlp.dow?", False),  # roles are no globs
        ("mlp.*", True),  # of the name, that is
        ("*.down_proj", True),
        ("down_proj", True),
        ("model.layers.1.*", True),
        ("model.layers.11.*", False),
        ("mlp.down_proj.weight", False),
    ],
)
def test_a_pattern_is_a_role_or_a_glob(pattern: str, is_one: bool) -> None:
    assert is_meant(pattern, "model.layers.1.mlp.down_proj", "mlp.down") is is_one


def test_roles_in_words() -> None:
    assert named_roles(["mlp.down", "other", "embedding", "mlp.down"]) == "embedding, mlp.down"
    assert named_roles(["other"]) == ""
