"""The job `generate` in Python: the tokens of transformers' own generate, who made them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import microscale
from command_line import succeed
from microscale.errors import CheckpointError, DtypeError, MicroscaleError, OptionError, TextError
from microscale.jobs.printing import json_value
from microscale.kernels.cpu import native
from small_models import BOS, LLAMA_6M, POSITIONS, save_random_model


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_random_model(folder / "model")
    with pytest.warns(microscale.errors.QuantizationNote):
        microscale.quantize(folder / "model", "mxfp4_plus", activations="mxfp8", output=folder / "out")
    return folder / "out"


def expected_text(model: Any, tokenizer: Any, prompt: str, num_tokens: int) -> str:
    ids = [BOS, *tokenizer(prompt)["input_ids"]]
    with torch.inference_mode():
        output = model.generate(torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", ["The sea", ""])
def test_a_loaded_model_and_its_directory_say_what_transformers_says(quantized: Path, prompt: str) -> None:
    model, tokenizer = microscale.load(quantized, dtype=torch.float32), microscale.load_tokenizer(quantized)
    text = expected_text(model, tokenizer, prompt, 12)
    pieces: list[str] = []
    found = microscale.generate(model, prompt, tokenizer=tokenizer, max_new_tokens=12, on_text=pieces.append)
    assert "".join(pieces) == found.text == text
    assert microscale.generate(quantized, prompt, max_new_tokens=12).text == text
    assert found.prompt == prompt and found.generation.prompt_tokens == 1 + len(prompt)
    assert 1 <= len(found.generation.tokens) <= 12
    assert 0 < found.start_seconds < found.seconds


def test_who_made_it(quantized: Path) -> None:
    found = microscale.generate(quantized, "The sea", max_new_tokens=3)
    assert (found.model, found.runtime.threads) == (str(quantized), torch.get_num_threads())
    if native.NATIVE is not None:
        assert (found.runtime.runtime, found.runtime.why_not_decoder) == ("decoder", None)
        assert {backend for calls in found.runtime.executed.values() for backend in calls} == {"cpu"}
    narrow = microscale.generate(quantized, "The sea", max_new_tokens=3, dtype="bfloat16").runtime
    assert narrow.runtime == "transformers" and "bfloat16" in str(narrow.why_not_decoder)
    backend = "reference" if native.NATIVE is None else "cpu"
    assert list(narrow.executed["linear"]) == [backend] and narrow.executed["linear"][backend] % 14 == 0


def test_python_and_the_command_line_say_the_same(quantized: Path) -> None:
    found = json_value(microscale.generate(quantized, "The sea", max_new_tokens=4, temperature=1.0, seed=3))
    options = ("-n", "4", "--temperature", "1", "--seed", "3", "--json")
    shown = succeed("generate", quantized, "The sea", *options).json
    assert list(found) == list(shown)
    assert {key: value for key, value in found.items() if "seconds" not in key and "per_second" not in key} == {
        key: value for key, value in shown.items() if "seconds" not in key and "per_second" not in key
    }


def test_sampling_depends_on_the_seed_alone(quantized: Path) -> None:
    model, tokenizer = microscale.load(quantized, dtype=torch.float32), microscale.load_tokenizer(quantized)

    def sample(seed: int, temperature: float = 1.0) -> str:
        words: dict[str, Any] = {"max_new_tokens": 16, "temperature": temperature, "seed": seed}
        return microscale.generate(model, "The sea", tokenizer=tokenizer, **words).text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1
    assert sample(1, 0.0) == sample(2, 0.0) == expected_text(model, tokenizer, "The sea", 16)


def test_a_real_model_continues_a_story() -> None:
    found = microscale.generate(LLAMA_6M, "Once upon a time", max_new_tokens=8)
    assert len(found.generation.tokens) == 8 and found.text.isprintable() and len(found.text.split()) >= 4


def test_a_tokenizer_without_bos_needs_a_prompt(tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "model")
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TextError, match="prompt is empty"):
        microscale.generate(source, "")
    assert len(microscale.generate(source, "a", max_new_tokens=2).generation.tokens) == 2


def test_the_last_position_can_be_used(quantized: Path) -> None:
    prompt = "a" * (POSITIONS - 5)  # with BOS one token more
    assert len(microscale.generate(quantized, prompt, max_new_tokens=4).generation.tokens) <= 4
    with pytest.raises(TextError, match=f"{POSITIONS} positions"):
        microscale.generate(quantized, prompt, max_new_tokens=5)


def _model_with_config() -> torch.nn.Module:
    model = torch.nn.Linear(2, 2)
    object.__setattr__(model, "config", {})
    return model


@pytest.mark.parametrize(
    ("words", "kind", "problem"),
    [
        ({"dtype": "int8"}, DtypeError, "unknown dtype"),
        ({"model": "absent/x/y"}, CheckpointError, "not a model directory"),
        ({"model": torch.nn.Linear(2, 2)}, OptionError, "model is a directory or hub name .* got .*Linear"),
        ({"model": _model_with_config()}, OptionError, "a loaded model needs tokenizer="),
        ({"max_new_tokens": 0}, OptionError, "max_new_tokens is a whole number from 1 on, got 0"),
        ({"temperature": -1.0}, OptionError, "temperature is a number from 0 on"),
        ({"top_p": 1.5}, OptionError, "top_p is a number from 0 to 1, got 1.5"),
        ({"max_tokens": 4}, OptionError, "did you mean max_new_tokens"),
    ],
)
def test_what_is_refused(quantized: Path, words: dict[str, Any], kind: type[MicroscaleError], problem: str) -> None:
    with pytest.raises(kind, match=problem):
        microscale.generate(**{"model": quantized, "prompt": "a", **words})
