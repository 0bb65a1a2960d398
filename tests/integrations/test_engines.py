"""Who runs a model: the decoder runtime where it gives what transformers would, else transformers with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from family_models import family_model
from microscale.integrations.engines import DecoderEngine, Runtime, TransformersEngine, make_engine

TOKENS = [5, 17, 3, 60]


def llama() -> Any:
    return family_model("llama", dtype=torch.float32)


def engine_of(model: Any, **options: Any) -> DecoderEngine | TransformersEngine:
    return make_engine(model, positions=16, **options)


@torch.no_grad()
@pytest.mark.parametrize("runtime", list(Runtime))
def test_tokens_at_once_one_by_one_and_anew_give_the_logits_of_the_model(runtime: Runtime) -> None:
    model = llama()
    expected = model(input_ids=torch.tensor([TOKENS])).logits[0]
    engine = engine_of(model) if runtime is Runtime.DECODER else TransformersEngine(model, "asked for")
    assert engine.runtime is runtime or engine.why_not_decoder
    for _ in range(2):
        engine.reset()
        torch.testing.assert_close(engine.prefill(TOKENS[:2]), expected[1], rtol=1e-4, atol=1e-4)
        for place in (2, 3):
            torch.testing.assert_close(engine.step(TOKENS[place]), expected[place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "is_neutral"),
    [
        ("repetition_penalty", 1.0, True),
        ("repetition_penalty", 1.1, False),
        ("num_beams", 4, False),
        ("suppress_tokens", [], True),
        ("suppress_tokens", [7], False),
        ("min_p", 0.0, True),
        ("bad_words_ids", [[3]], False),
    ],
)
def test_settings_that_change_tokens_go_to_transformers(name: str, value: Any, is_neutral: bool) -> None:
    model = llama()
    setattr(model.generation_config, name, value)
    reason = engine_of(model).why_not_decoder
    told = f"the generation config sets {name} = {value}, which only transformers carries out"
    assert (reason != told) is is_neutral


def test_another_float_type_goes_to_transformers_and_is_cast() -> None:
    engine = engine_of(llama(), compute_dtype=torch.bfloat16)
    assert isinstance(engine, TransformersEngine) and engine.model.dtype == torch.bfloat16
    assert engine.why_not_decoder == "it computes in float32, asked for is bfloat16"
