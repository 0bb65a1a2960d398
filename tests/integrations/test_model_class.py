"""The class of a checkpoint: what its config names, if that fits, else what sees before what does not."""

from __future__ import annotations

import pytest
import transformers

from microscale.errors import ModelError
from microscale.integrations.model_class import class_of
from tiny_models import tiny_config


def test_a_config_without_a_class_gets_the_one_that_sees() -> None:
    config = tiny_config("qwen3_5")
    assert config.architectures is None
    assert class_of(config).__name__ == "Qwen3_5ForConditionalGeneration"
    assert class_of(tiny_config("llama")) is transformers.LlamaForCausalLM
    config.architectures = ["NoSuchModel", "LlamaForCausalLM", "Qwen3_5Model"]
    assert class_of(config).__name__ == "Qwen3_5Model", "a class of another family is passed over"
    with pytest.raises(ModelError, match="no class for models of the type"):
        class_of(transformers.PretrainedConfig())
