"""Decoder layers one by one: their inputs, arguments and outputs are those of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microscale
from microscale.errors import ModelError
from microscale.families.batch import Batch
from microscale.layerwise.blocks import BlockRunner, float32_model, removed_after, replaced_forward, to_float32
from microscale.layerwise.returned import Returned
from small_models import save_random_model

TOKENS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))
NAMES = {"llama": "model.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers", "gemma3_text": "model.layers"}


def load(path: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Any, list[str]]:
    model = microscale.load(save_random_model(path / family, family), dtype=dtype)
    return model, [f"{NAMES[family]}.{place}" for place in range(2)]


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_layers_give_what_they_give_in_the_model(family: str, batch: int, tmp_path: Path) -> None:
    model, names = load(tmp_path, family)
    with torch.no_grad():
        wanted = model(input_ids=TOKENS, use_cache=False, output_hidden_states=True).hidden_states
    runner = BlockRunner(model, names, Batch(token_ids=TOKENS), batch=batch)
    assert runner.num_batches == -(-3 // batch)
    for place, hidden in enumerate(runner.embedded()):
        rows = slice(batch * place, batch * (place + 1))
        torch.testing.assert_close(hidden, wanted[0][rows], rtol=0, atol=1e-6)
        with torch.no_grad():
            after = runner.run(0, hidden, batch=place)
        torch.testing.assert_close(after, wanted[1][rows], rtol=1e-4, atol=1e-5)


def test_inputs_are_float32_whatever_the_model_is(tmp_path: Path) -> None:
    """Masks and rotations too: a layer in float32 runs on them."""
    model, names = load(tmp_path, dtype=torch.bfloat16)
    runner = BlockRunner(model, names, Batch(token_ids=TOKENS), batch=3)
    (hidden,) = runner.embedded()
    assert hidden.dtype == torch.float32 and torch.equal(hidden, model.model.embed_tokens(TOKENS).float())
    to_float32(model.get_submodule(names[1]))
    with torch.no_grad():
        assert runner.run(1, hidden, batch=0).dtype == torch.float32


def test_layers_without_weights_can_be_recorded(tmp_path: Path) -> None:
    model, names = load(tmp_path)
    whole = BlockRunner(model, names, Batch(token_ids=TOKENS), batch=3)
    wanted = next(whole.embedded())
    model.model.layers.to("meta")
    runner = BlockRunner(model, names, Batch(token_ids=TOKENS), batch=3, returned=whole.returned)
    assert torch.equal(next(runner.embedded()), wanted) and str(runner.device) == "cpu"


class Skipping(nn.Module):
    """A model that never runs its second layer, and hands the first what it is told."""

    def __init__(self, first: Any = None) -> None:
        super().__init__()
        self.first = first
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        del use_cache
        return self.layers[0](torch.zeros(len(input_ids), 4) if self.first is None else self.first)


def test_models_that_are_not_run_layer_by_layer() -> None:
    names, batch = ["layers.0", "layers.1"], Batch(token_ids=TOKENS)
    with pytest.raises(ModelError, match=r"layers\.1 is not run by the model; it cannot be calibrated layer by layer"):
        BlockRunner(Skipping(), names, batch, batch=3)
    with pytest.raises(ModelError, match=r"layers\.1 is not run by the model"):
        BlockRunner(Skipping(), names[::-1], batch, batch=3)
    with pytest.raises(ModelError, match=r"layers\.0 does not get its hidden states first; this model is not known"):
        BlockRunner(Skipping("words"), names, batch, batch=3, returned=Returned())


class Layered(nn.Module):
    """Two layers; what happens between them, and what they are given besides, is a case of the test."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.between = between
        self.embed = nn.Embedding(256, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        del use_cache
        start = self.embed(input_ids)
        hidden, carried, _ = self.layers[0](start, extra=start if self.between == "text" else None)
        if self.between in ("halved", "bent"):
            hidden = hidden / 2 if self.between == "halved" else hidden.tanh()
        extra = {"text": start, "carried": carried}.get(self.between)
        return self.layers[1](hidden, extra=extra)[0]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, hidden: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor, None]:
        mixed = self.mix(hidden)
        return (mixed if extra is None else mixed + 3 * extra), mixed, None


@pytest.mark.parametrize("between", ["nothing", "text", "halved"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_what_happens_between_layers_and_what_hangs_on_the_text(between: str, batch: int) -> None:
    """Zamba2 shows later layers the embeddings again, RWKV halves hidden states on their way."""
    torch.manual_seed(0)
    model, tokens = Layered(between), Batch(token_ids=TOKENS)
    runner = BlockRunner(model, ["layers.0", "layers.1"], tokens, batch=batch)
    with torch.no_grad():
        found = [
            runner.run(1, runner.run(0, hidden, batch=place), batch=place)
            for place, hidden in enumerate(runner.embedded())
        ]
        torch.testing.assert_close(torch.cat(found), model(TOKENS, use_cache=False))


def test_layers_that_hand_on_more_than_hidden_states_are_refused() -> None:
    for between, said in (("carried", "gets more than hidden states"), ("bent", "gets other hidden states")):
        with pytest.raises(ModelError, match=rf"layers\.1 {said}.*use a method without calibration text"):
            BlockRunner(Layered(between), ["layers.0", "layers.1"], Batch(token_ids=TOKENS), batch=1)


def test_a_replaced_forward_ends_with_the_block() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    inputs = torch.randn(2, 4)
    wanted = model(inputs)
    with pytest.raises(KeyError), replaced_forward({"0": lambda x: x + 1, "1": lambda x: 2 * x}, model):
        assert torch.equal(model(inputs), 2 * (inputs + 1))
        raise KeyError
    assert torch.equal(model(inputs), wanted) and "forward" not in model[0].__dict__


def test_a_hook_ends_with_the_block() -> None:
    layer, calls = nn.Linear(2, 2), list[int]()
    with pytest.raises(KeyError), removed_after(layer.register_forward_hook(lambda *_: calls.append(1))):
        layer(torch.zeros(1, 2))
        raise KeyError
    layer(torch.zeros(1, 2))
    assert calls == [1]


def test_float32_inside_of_the_block_only() -> None:
    """Numbers come back to the bit, what was changed inside is rounded, and integers are left alone."""
    model: Any = nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2, dtype=torch.float16, bias=False))
    model.register_parameter("places", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(KeyError), float32_model(model) as dtypes:
        assert dtypes == {name: parameter.dtype for name, parameter in before.items()}
        kept = {name: parameter.dtype for name, parameter in model.named_parameters() if name != "places"}
        assert set(kept.values()) == {torch.float32} and model.places.dtype == torch.int64
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model[1].weight.data[0, 0] = 1 / 3
        raise KeyError
    for name, parameter in model.named_parameters():
        assert parameter.dtype == before[name].dtype
        assert torch.equal(parameter, before[name]) or name == "1.weight"
    assert model[1].weight[0, 0] == torch.tensor(1 / 3, dtype=torch.float16)
