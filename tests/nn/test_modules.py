"""Modules of a model: read a weight, put a module in the place of another, keep tied weights true."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from microscale.nn.modules import float_weight, replace_module, untie


def test_a_module_is_replaced_by_its_dotted_name() -> None:
    model: Any = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.Identity()), nn.Identity())
    new = nn.Linear(2, 3)
    replace_module(model, "0.0", new)
    assert model[0][0] is new and list(model[0]._modules) == ["0", "1"], "the order stays"
    replace_module(model, "1", new)
    assert model[1] is new
    with pytest.raises(AttributeError):
        replace_module(model, "0.7.0", new)


def test_a_weight_is_out_by_in_whatever_holds_it() -> None:
    """Conv1D of GPT-2 keeps [in, out]."""
    linear, conv = nn.Linear(5, 3).to(torch.bfloat16), Conv1D(3, 5)
    x = torch.randn(2, 5)
    assert tuple(float_weight(linear).shape) == (3, 5) and float_weight(linear).dtype == torch.float32
    assert not float_weight(linear).requires_grad
    torch.testing.assert_close(x @ float_weight(conv).T + conv.bias, conv(x))
    assert float_weight(conv).is_contiguous()


TIES = {"lm_head.weight": "embed.weight", "decoder.weight": "encoder.weight"}


class Tied(nn.Module):
    """A model with a head that is tied to its embedding, and a pair inside that is tied too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Embedding(4, 2), nn.Linear(2, 4)
        self.lm_head, self.decoder = nn.Linear(2, 4), nn.Linear(2, 4)
        self.all_tied_weights_keys = dict(TIES)
        self.config = SimpleNamespace(tie_word_embeddings=True)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


@pytest.mark.parametrize(
    ("quantized", "left", "is_tied"),
    [
        (set(), {"lm_head.weight", "decoder.weight"}, True),
        ({"layers.0"}, {"lm_head.weight", "decoder.weight"}, True),
        ({"embed"}, {"decoder.weight"}, False),
        ({"lm_head", "layers.0"}, {"decoder.weight"}, False),
        ({"lm_head", "encoder"}, set(), False),
        ({"encoder"}, {"lm_head.weight"}, True),
    ],
)
def test_a_pair_is_untied_where_either_side_is_packed(quantized: set[str], left: set[str], is_tied: bool) -> None:
    """The head stays tied where the pair that is packed lies elsewhere."""
    model = Tied()
    untie(model, quantized)
    assert set(model.all_tied_weights_keys) == left
    assert model.config.tie_word_embeddings is is_tied


def test_a_model_without_ties_stays() -> None:
    model = SimpleNamespace(config=SimpleNamespace(tie_word_embeddings=False))
    untie(model, {"lm_head"})
    assert vars(model) == {"config": model.config}
