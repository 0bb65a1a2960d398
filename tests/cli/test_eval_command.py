"""`microscale eval`: the number, its JSON, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import microscale
from command_line import fail, microscale_command, succeed
from small_models import BOS, POSITIONS, logits, save_random_model

TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. ü" * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def independent_perplexity(path: Path, content: bytes, window: int) -> tuple[float, int]:
    """Score byte by byte from the definition: each window is BOS and the next window - 1 bytes."""
    model = microscale.load(path, dtype=torch.float32)
    total, count = 0.0, 0
    ids = microscale.load_tokenizer(path)(content.decode(), add_special_tokens=False)["input_ids"]
    assert len(ids) == len(content)  # one token for each byte
    for start in range(0, len(ids), window - 1):
        piece = [BOS, *ids[start : start + window - 1]]
        scores = functional.log_softmax(logits(model, torch.tensor([piece]))[0].double(), dim=-1)
        for place, token in enumerate(piece[1:]):
            total -= float(scores[place, token])
            count += 1
    return math.exp(total / count), count


def test_the_json_answer(model: Path, text: Path) -> None:
    found = succeed("eval", model, "--text", text, "--window", "32", "--json").json
    expected, count = independent_perplexity(model, TEXT.encode(), 32)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert found["tokens"] == count == len(TEXT.encode())
    assert found["windows"] == math.ceil(count / 31)
    assert found["seconds"] > 0
    assert (found["window"], found["dtype"], found["model"], found["text"]) == (32, "float32", str(model), str(text))


def test_the_text_answer(model: Path, text: Path) -> None:
    answer = succeed("eval", model, "--text", text, "--window", "32").stdout
    expected, count = independent_perplexity(model, TEXT.encode(), 32)
    assert answer.startswith(f"perplexity {expected:.2f}"[:14])
    assert f"over {count} tokens" in answer and "float32" in answer


def test_tokens_takes_the_first_ones(model: Path, text: Path) -> None:
    found = succeed("eval", model, "--text", text, "--window", "32", "--tokens", "40", "--json").json
    expected, count = independent_perplexity(model, TEXT.encode()[:40], 32)
    assert (found["tokens"], found["windows"]) == (count, 2) == (40, 2)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_attention_and_the_cache(model: Path, text: Path, tmp_path: Path) -> None:
    options = ("--text", text, "--window", "32")
    plain = succeed("eval", model, *options, "--json").json
    assert plain["attention"] == {"products": None, "kv_cache": None}
    found = succeed("eval", model, *options, "--attention", "mxfp4", "--kv-cache", "mxfp8", "--json").json
    assert found["attention"] == {"products": "mxfp4", "kv_cache": "mxfp8_e4m3"}
    assert found["perplexity"] != plain["perplexity"]
    shown = succeed("eval", model, *options, "--attention", "mxfp4").stdout
    assert "products of attention in mxfp4: simulated" in " ".join(shown.split())
    stored = tmp_path / "out"
    made = succeed(
        "quantize", model, "-f", "bf16/32:e8m0", "--attention", "mxfp4", "--rule", "kv_cache=mxfp8", "-o", stored
    )
    assert "simulated" in made.stdout
    again = succeed("eval", stored, *options, "--json").json
    assert again["attention"] == found["attention"]
    assert again["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)
    neither = succeed("eval", stored, *options, "--attention", "none", "--kv-cache", "none", "--json").json
    assert neither["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)
    assert succeed("inspect", stored, "--json").json["attention"] == "mxfp4"
    assert "KV cache in mxfp8_e4m3" in succeed("inspect", stored).stdout
    answer = succeed("generate", stored, "The sea", "-n", "3", "--json").json
    assert answer["runtime"] == "transformers" and "KV cache in mxfp8_e4m3" in answer["why_not_decoder"]


@pytest.mark.parametrize("layout", ["microscale", "compressed-tensors"])
def test_a_quantized_checkpoint(layout: str, model: Path, text: Path, tmp_path: Path) -> None:
    succeed("quantize", model, "-f", "mxfp4", "-a", "mxfp8:even(1)", "--layout", layout, "-o", tmp_path / "out")
    found = succeed("eval", tmp_path / "out", "--text", text, "--window", "32", "--json").json
    expected, _ = independent_perplexity(tmp_path / "out", TEXT.encode(), 32)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
    original = succeed("eval", model, "--text", text, "--window", "32", "--json").json
    assert found["perplexity"] != original["perplexity"]


def test_the_dtype_of_the_computation(model: Path, text: Path) -> None:
    scores = {
        dtype: succeed("eval", model, "--text", text, "--window", "32", "--dtype", dtype, "--json").json["perplexity"]
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert len(set(scores.values())) == 3
    assert max(scores.values()) / min(scores.values()) < 1.02


def test_batches_do_not_change_the_score(model: Path, text: Path) -> None:
    scores = [
        succeed("eval", model, "--text", text, "--window", "16", "--batch", batch, "--json").json["perplexity"]
        for batch in (1, 3, 50)
    ]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


REFUSED = {
    "no text file": (["--text", "absent.txt"], "absent.txt cannot be read"),
    "too many tokens": (["--tokens", "100000"], "fewer than the 100000 asked for"),
    "no tokens": (["--tokens", "0"], "must be positive"),
    "negative tokens": (["--tokens", "-3"], "must be positive"),
    "a window of one": (["--window", "1"], "at least 2 tokens"),
    "a window longer than the model": (["--window", str(POSITIONS + 1)], f"{POSITIONS} positions"),
    "an unknown dtype": (["--window", "16", "--dtype", "int8"], "unknown dtype 'int8'"),
    "an unknown format of attention": (["--attention", "mxfp5"], "unknown format 'mxfp5'"),
    "a static range of the cache": (["--kv-cache", "nvfp4@static"], "by the numbers at hand"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_request(case: str, model: Path, text: Path) -> None:
    arguments, words = REFUSED[case]
    if "--text" not in arguments:
        arguments = ["--text", str(text), *arguments]
    assert words in fail("eval", model, *arguments)
    error = microscale_command("eval", model, *arguments, "--json").json["error"]
    assert words in error["message"]


@pytest.mark.parametrize("content", [b"", b" \n\n", b"\xff\xfe\x00"])
def test_a_text_that_is_none(content: bytes, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    message = fail("eval", model, "--text", tmp_path / "text.txt")
    assert "is empty" in message or "UTF-8" in message
    assert fail("eval", model, "--text", tmp_path)


def test_a_model_without_tokenizer(text: Path, tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "model")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    assert "no tokenizer" in fail("eval", source, "--text", text)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": {"type": "none"}}', '{"version": "1.0", "model": 3}'])
def test_a_broken_tokenizer(content: str, text: Path, tmp_path: Path) -> None:
    source = save_random_model(tmp_path / "model")
    (source / "tokenizer.json").write_text(content)
    assert "tokenizer" in fail("eval", source, "--text", text)
    assert "tokenizer" in fail("generate", source, "a")


def test_a_missing_option_is_a_usage_error(model: Path) -> None:
    outcome = microscale_command("eval", model)
    assert outcome.code == 2 and "--text" in outcome.stderr and outcome.stdout == ""


def test_a_reference_and_layers(model: Path, text: Path, tmp_path: Path) -> None:
    succeed("quantize", model, "-f", "mxfp4", "-o", tmp_path / "out")
    options = ("--text", text, "--window", "32", "--reference", model)
    found = succeed("eval", tmp_path / "out", *options, "--layers", "--json").json
    plain = succeed("eval", tmp_path / "out", "--text", text, "--window", "32", "--json").json
    assert found["perplexity"] == plain["perplexity"] and found["reference"] == str(model)
    original = succeed("eval", model, "--text", text, "--window", "32", "--json").json
    assert found["reference_perplexity"] == original["perplexity"]
    assert 0.0 < found["kl_mean"] < found["kl_p99"] <= found["kl_max"] and 0.0 < found["agreement"] < 1.0
    assert [layer["name"] for layer in found["layers"]] == ["model.layers.0", "model.layers.1"]
    assert all(0.0 < layer["relative_error"] < 1.0 and layer["sqnr_db"] > 0.0 for layer in found["layers"])
    same = succeed("eval", model, *options, "--json").json
    assert same["kl_max"] == 0.0 and same["agreement"] == 1.0 and "layers" not in same


def test_the_text_answer_with_a_reference(model: Path, text: Path) -> None:
    answer = succeed("eval", model, "--text", text, "--window", "32", "--reference", model, "--layers").stdout
    assert "KL divergence 0.00000" in answer and "agreement 100.00 %" in answer and "model.layers.1" in answer


def test_a_reference_that_fits_not(model: Path, text: Path, tmp_path: Path) -> None:
    other = save_random_model(tmp_path / "other", vocab_size=300)
    options = ("--text", text, "--window", "32", "--reference")
    assert "one vocabulary" in fail("eval", model, *options, other)
    assert "is not a model directory" in fail("eval", model, *options, tmp_path / "absent")
    outcome = microscale_command("eval", model, "--text", text, "--layers")
    assert outcome.code == 2 and "--reference" in outcome.stderr
