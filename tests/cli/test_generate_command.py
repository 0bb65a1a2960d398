"""`microscale generate`: the same tokens as transformers' own generate, streamed, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import microscale
from command_line import fail, microscale_command, succeed
from microscale.kernels.cpu import native
from small_models import BOS, LLAMA_6M, POSITIONS, save_random_model


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_random_model(folder / "model")
    succeed("quantize", folder / "model", "-f", "mxfp4_plus", "-a", "mxfp8", "-o", folder / "out")
    return folder / "out"


def expected_text(path: Path, prompt: str, num_tokens: int) -> str:
    model, tokenizer = microscale.load(path, dtype=torch.float32), microscale.load_tokenizer(path)
    ids = [BOS, *tokenizer(prompt)["input_ids"]]
    with torch.inference_mode():
        output = model.generate(torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_the_json_answer(quantized: Path) -> None:
    outcome = succeed("generate", quantized, "The sea", "-n", "12", "--json")
    found = outcome.json
    assert found["text"] == expected_text(quantized, "The sea", 12)
    assert (found["prompt"], found["model"]) == ("The sea", str(quantized))
    assert 1 <= found["tokens"] <= 12 and found["seconds"] > 0
    assert found["prompt_tokens"] == 8 and found["prefill_tokens_per_second"] > 0 and found["start_seconds"] > 0
    assert found["threads"] == torch.get_num_threads() and found["level"] == native.level_name()
    if native.NATIVE is not None:
        assert (found["runtime"], found["why_not_decoder"]) == ("decoder", None)
        assert {backend for calls in found["calls"].values() for backend in calls} == {"cpu"}


def test_where_the_decoder_does_not_run_it_says_why(quantized: Path) -> None:
    found = succeed("generate", quantized, "The sea", "-n", "3", "--dtype", "bfloat16", "--json").json
    assert found["runtime"] == "transformers" and "bfloat16" in found["why_not_decoder"]
    backend = "reference" if native.NATIVE is None else "cpu"
    assert list(found["calls"]["linear"]) == [backend] and found["calls"]["linear"][backend] % 14 == 0
    outcome = succeed("generate", quantized, "The sea", "-n", "3", "--dtype", "bfloat16")
    assert "not the decoder runtime: it computes in float32" in outcome.stdout
    assert "linear calls on the" in outcome.stdout


def test_the_text_answer(quantized: Path) -> None:
    outcome = succeed("generate", quantized, "The sea", "-n", "12")
    assert outcome.stdout.startswith("The sea" + expected_text(quantized, "The sea", 12).rstrip()[:8])
    assert "tokens in" in outcome.stdout


def test_a_real_model_continues_a_story() -> None:
    found = succeed("generate", LLAMA_6M, "Once upon a time", "-n", "8", "--json").json
    assert found["tokens"] == 8 and found["text"].isprintable() and len(found["text"].split()) >= 4


def test_sampling_depends_on_the_seed_alone(quantized: Path) -> None:
    def sample(seed: int, temperature: float = 1.0) -> str:
        arguments = ("-n", "16", "--temperature", temperature, "--seed", seed, "--json")
        return succeed("generate", quantized, "The sea", *arguments).json["text"]

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1
    assert sample(1, 0.0) == sample(2, 0.0) == expected_text(quantized, "The sea", 16)


def test_an_empty_prompt_begins_with_bos(quantized: Path) -> None:
    assert succeed("generate", quantized, "", "-n", "4", "--json").json["text"] == expected_text(quantized, "", 4)


def test_a_tokenizer_without_bos_needs_a_prompt(tmp_path: Path) -> None:
    import json

    source = save_random_model(tmp_path / "model")
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    assert "prompt is empty" in fail("generate", source, "")
    assert succeed("generate", source, "a", "-n", "2", "--json").json["tokens"] == 2


def test_what_is_refused(quantized: Path, tmp_path: Path) -> None:
    assert f"{POSITIONS} positions" in fail("generate", quantized, "a" * POSITIONS, "-n", "4")
    assert f"{POSITIONS} positions" in fail("generate", quantized, "a", "-n", POSITIONS)
    assert "unknown dtype" in fail("generate", quantized, "a", "--dtype", "int8")
    assert "not a model directory" in fail("generate", tmp_path / "absent" / "x", "a")
    for arguments in (("-n", "0"), ("--temperature", "-1"), ("--top-p", "1.5")):
        assert microscale_command("generate", quantized, "a", *arguments).code == 2


def test_the_last_position_can_be_used(quantized: Path) -> None:
    prompt = "a" * (POSITIONS - 5)  # with BOS one token more
    assert succeed("generate", quantized, prompt, "-n", "4", "--json").json["tokens"] <= 4
    assert "positions" in fail("generate", quantized, prompt, "-n", "5")
