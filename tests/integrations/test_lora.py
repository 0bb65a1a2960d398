"""LoRA through PEFT over packed weights: attached, trained, saved, loaded again, and never packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from microscale.errors import ModelError
from microscale.hf import enable_lora
from microscale.nn.linear import QuantizedLinear
from small_models import same_bits, save_two_layers

peft: Any = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.randint(3, 900, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_two_layers(tmp_path_factory.mktemp("models") / "llama")


def config(**changes: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM", **changes)


def adapted(source: Path, folder: Path, weights: str, *inputs: str) -> tuple[Any, Path]:
    """Return a freshly loaded quantized model with an adapter, and where the quantized one lies."""
    words = {"activations": inputs[0]} if inputs else {}
    microscale.quantize(str(source), weights, output=folder / "packed", **words)
    enable_lora()
    torch.manual_seed(0)
    return peft.get_peft_model(microscale.load(folder / "packed"), config()), folder / "packed"


@pytest.mark.parametrize("formats", [("mxfp4",), ("mxfp4", "mxfp8"), ("mxfp4_plus", "mxfp4_plus"), ("nvfp4",)])
def test_it_learns_over_packed_weights(formats: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    model, packed = adapted(source, tmp_path, *formats)
    names = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(names) == 14 and sum(name.endswith("base_layer") for name in names) == 6
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 12 and all("lora_" in name for name in trained)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses: list[float] = []
    for _ in range(12):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3, losses
    after = model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(microscale.load(packed), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert same_bits(again(input_ids=TOKENS).logits, expected)


def test_a_fresh_adapter_changes_nothing(source: Path, tmp_path: Path) -> None:
    model, packed = adapted(source, tmp_path, "mxfp4", "mxfp4")
    with torch.no_grad():
        assert same_bits(model(input_ids=TOKENS).logits, microscale.load(packed)(input_ids=TOKENS).logits)


def test_merging_into_packed_weights_is_refused_with_the_way(source: Path, tmp_path: Path) -> None:
    model, _ = adapted(source, tmp_path, "mxfp4")
    with pytest.raises(ModelError, match="microscale quantize"):
        model.merge_and_unload()


def test_an_adapter_is_never_packed(source: Path) -> None:
    """Quantizing a float model that carries one rounds its base layers alone."""
    enable_lora()
    enable_lora()
    model = peft.get_peft_model(microscale.load(source), config())
    microscale.quantize(model.base_model.model, "mxfp4")
    kinds = {name: type(module) for name, module in model.named_modules()}
    adapters = [kind for name, kind in kinds.items() if ".lora_A.default" in name or ".lora_B.default" in name]
    assert len(adapters) == 12 and set(adapters) == {torch.nn.Linear}
    assert kinds["base_model.model.model.layers.0.self_attn.q_proj.base_layer"] is QuantizedLinear
    assert bool(torch.isfinite(model(input_ids=TOKENS).logits).all())


def test_layers_that_are_not_ours_keep_their_adapters(source: Path) -> None:
    enable_lora()
    model = peft.get_peft_model(microscale.load(source), config())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear"
