"""`microscale generate`: the text as it comes, the closing line, and errors as a user sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import fail, microscale_command, succeed
from small_models import POSITIONS, save_random_model


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_random_model(folder / "model")
    succeed("quantize", folder / "model", "-f", "mxfp4_plus", "-a", "mxfp8", "-o", folder / "out")
    return folder / "out"


def test_the_text_comes_behind_the_prompt(quantized: Path) -> None:
    outcome = succeed("generate", quantized, "The sea", "-n", "12")
    text = succeed("generate", quantized, "The sea", "-n", "12", "--json").json["text"]
    assert outcome.stdout.startswith("The sea" + text.rstrip()[:8]) and "tokens in" in outcome.stdout


def test_where_the_decoder_does_not_run_it_says_why(quantized: Path) -> None:
    outcome = succeed("generate", quantized, "The sea", "-n", "3", "--dtype", "bfloat16")
    assert "not the decoder runtime: it computes in float32" in outcome.stdout
    assert "linear calls on the" in outcome.stdout


def test_what_is_refused(quantized: Path, tmp_path: Path) -> None:
    answer = microscale_command("generate", quantized, "a" * POSITIONS, "-n", "4")
    assert (answer.code, answer.stdout) == (1, ""), "an error stands alone, without the prompt"
    assert f"{POSITIONS} positions" in answer.stderr
    assert "not a model directory" in fail("generate", tmp_path / "absent" / "x", "a")
    for arguments in (("-n", "0"), ("--temperature", "-1"), ("--top-p", "1.5")):
        assert microscale_command("generate", quantized, "a", *arguments).code == 2
