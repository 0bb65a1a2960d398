"""Records of decoder families: every name is a module of a model that transformers builds."""

from __future__ import annotations

import pytest
import torch
import transformers

from microscale.families.decoders import DECODER_FAMILIES


@pytest.mark.parametrize("model_type", list(DECODER_FAMILIES))
def test_every_name_is_a_module(model_type: str) -> None:
    family = DECODER_FAMILIES[model_type]
    config = transformers.AutoConfig.for_model(
        model_type, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == family.architecture
    for name in (family.embedding, family.rotary, family.final_norm, family.head):
        model.get_submodule(name)
    layer = model.get_submodule(family.layers)[0]
    leaves = {name.rpartition(".")[0] for name, _ in layer.named_parameters()}
    assert leaves == {*family.linears, *family.norms}
