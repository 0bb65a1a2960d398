"""generate_text: transformers' own tokens, greedy and sampled, ends, timing, and which runtime ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import microscale
from microscale.errors import ModelError, TextError
from microscale.integrations.engines import (
    DecoderEngine,
    Runtime,
    TransformersEngine,
    load_for_decoding,
    make_engine,
)
from microscale.integrations.generation import Sampling, choose_token, encode_prompt, generate_text
from microscale.kernels.cpu import native
from microscale.nn.inference import cached_weights
from small_models import BOS, LLAMA_6M, save_random_model

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason="the compiled kernels are not installed")

PROMPT = "Once upon a time there was a little"
SETTINGS = [(None, None), ("mxfp4", None), ("mxfp4", "mxfp8"), ("mxfp4", "int8/32:fp32:amax")]


def load(path: Path, fmt: str | None, act: str | None) -> Any:
    if fmt is None:
        return microscale.load(path, dtype=torch.float32)
    return microscale.quantize(path, fmt, activations=act).float()


def transformers_tokens(model: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    with torch.inference_mode(), cached_weights(model):
        output = model.generate(torch.tensor([ids]), max_new_tokens=count, **({"do_sample": False} | options))
    return output[0, len(ids) :].tolist()


def margin_and_noise(model: Any, ids: list[int]) -> tuple[float, float]:
    """The lead of the best token after some tokens, and how far float noise alone moves transformers' own logits.

    A rounding that flips at one token stays in the cache, so every place before counts. The noise is a relative change
    of 2^-20 in the embedding (16 half steps of float32), and the model's cache against the whole text at once.
    """
    with torch.inference_mode(), cached_weights(model):

        def logits() -> Tensor:
            return model(torch.tensor([ids])).logits[0]

        expected = logits()
        best = expected[-1].topk(2).values
        output, stepwise = None, []
        for token in ids:
            cache = None if output is None else output.past_key_values
            output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            stepwise.append(output.logits[0, -1])
        moved = float((torch.stack(stepwise) - expected).abs().max())
        table = model.get_input_embeddings().weight
        before = table.detach().clone()
        for seed in range(4):
            noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(seed)) * 2.0**-20
            table.data.copy_(before * (1 + noise))
            moved = max(moved, float((logits() - expected).abs().max()))
        table.data.copy_(before)
    return float(best[0] - best[1]), moved


def check_greedy(path: Path, fmt: str | None, act: str | None, count: int) -> None:
    """Token for token; where activations are rounded, up to a near-tie that float noise alone can turn."""
    model, tokenizer = load(path, fmt, act), microscale.load_tokenizer(path)
    ids = encode_prompt(tokenizer, PROMPT, model.config, count)
    expected = transformers_tokens(model, ids, count)
    found = generate_text(model, tokenizer, PROMPT, max_new_tokens=count)
    assert found.runtime is Runtime.DECODER and found.why_not_decoder is None
    if list(found.tokens) != expected:
        assert act is not None, "without rounded activations nothing can flip"
        agreed = next(i for i, pair in enumerate(zip(found.tokens, expected, strict=False)) if pair[0] != pair[1])
        margin, noise = margin_and_noise(model, [*ids, *expected[:agreed]])
        assert margin <= 2 * noise  # each of the two best may move
        return
    assert found.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert found.prompt_tokens == len(ids) and found.prefill_seconds > 0 and found.decode_seconds > 0


@pytest.mark.parametrize(("fmt", "act"), SETTINGS)
def test_greedy_tokens_of_the_small_real_model(fmt: str | None, act: str | None) -> None:
    check_greedy(LLAMA_6M, fmt, act, 32)


@pytest.mark.parametrize("name", ["llama-30m", "qwen3-30m"])
@pytest.mark.parametrize(("fmt", "act"), SETTINGS)
def test_greedy_tokens_of_real_models(shared_dir: Path, name: str, fmt: str | None, act: str | None) -> None:
    check_greedy(shared_dir / "models" / name, fmt, act, 24)


@pytest.fixture(scope="module")
def random_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("models") / "model", "qwen3", dtype=torch.float32)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.2)])
def test_sampled_tokens_are_those_of_transformers(random_path: Path, temperature: float, top_p: float) -> None:
    model, tokenizer = load(random_path, None, None), microscale.load_tokenizer(random_path)
    options = {"max_new_tokens": 30, "temperature": temperature, "top_p": top_p}
    for seed in (0, 1):
        found = generate_text(model, tokenizer, "The sea", seed=seed, **options)
        torch.manual_seed(seed)
        ids = encode_prompt(tokenizer, "The sea", model.config, 30)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        assert list(found.tokens) == transformers_tokens(model, ids, 30, **sampling)
        assert found.tokens == generate_text(model, tokenizer, "The sea", seed=seed, **options).tokens


def test_the_top_k_of_the_generation_config_counts(random_path: Path) -> None:
    model, tokenizer = load(random_path, None, None), microscale.load_tokenizer(random_path)
    greedy = generate_text(model, tokenizer, "The sea", max_new_tokens=20).tokens
    model.generation_config.top_k = 1
    assert generate_text(model, tokenizer, "The sea", max_new_tokens=20, temperature=3.0).tokens == greedy


@pytest.mark.parametrize("as_list", [True, False])
def test_an_end_token_ends_the_text(random_path: Path, as_list: bool) -> None:
    model, tokenizer = load(random_path, None, None), microscale.load_tokenizer(random_path)
    free = generate_text(model, tokenizer, "The sea", max_new_tokens=20).tokens
    end = free[4]
    model.generation_config.eos_token_id = [BOS, end] if as_list else end
    found = generate_text(model, tokenizer, "The sea", max_new_tokens=20).tokens
    assert found == free[: free.index(end) + 1]
    ids = encode_prompt(tokenizer, "The sea", model.config, 20)
    assert list(found) == transformers_tokens(model, ids, 20)


def test_the_text_arrives_in_pieces(random_path: Path) -> None:
    model, tokenizer = load(LLAMA_6M, "mxfp4", None), microscale.load_tokenizer(LLAMA_6M)
    pieces: list[str] = []
    found = generate_text(model, tokenizer, PROMPT, max_new_tokens=16, on_text=pieces.append)
    assert "".join(pieces) == found.text and sum(bool(piece) for piece in pieces) > 3


def test_settings_that_only_transformers_carries_out(random_path: Path) -> None:
    model, tokenizer = load(random_path, None, None), microscale.load_tokenizer(random_path)
    model.generation_config.repetition_penalty = 1.5
    found = generate_text(model, tokenizer, "The sea", max_new_tokens=8)
    assert found.runtime is Runtime.TRANSFORMERS and "repetition_penalty = 1.5" in str(found.why_not_decoder)
    ids = encode_prompt(tokenizer, "The sea", model.config, 8)
    assert list(found.tokens) == transformers_tokens(model, ids, 8)
    assert found.prefill_speed > 0 and found.decode_speed > 0


def test_other_families_and_dtypes_run_in_transformers(tmp_path: Path) -> None:
    gpt2 = save_random_model(tmp_path / "gpt2", "gpt2")
    found = generate_text(
        microscale.load(gpt2, dtype=torch.float32), microscale.load_tokenizer(gpt2), "The sea", max_new_tokens=3
    )
    assert found.runtime is Runtime.TRANSFORMERS and "gpt2" in str(found.why_not_decoder)
    llama = microscale.load(save_random_model(tmp_path / "llama"), dtype=torch.bfloat16)
    engine = make_engine(llama, positions=8)
    assert isinstance(engine, TransformersEngine) and "bfloat16" in str(engine.why_not_decoder)
    engine = make_engine(llama, positions=8, compute_dtype=torch.float32)
    assert isinstance(engine, DecoderEngine)


def test_both_engines_give_the_same_logits(random_path: Path) -> None:
    model = load(random_path, "mxfp8", None)
    thin, slow = make_engine(model, positions=12), TransformersEngine(model, "asked for")
    for engine in (thin, slow):
        engine.reset()
    assert torch.allclose(thin.prefill([1, 2, 3]), slow.prefill([1, 2, 3]), atol=1e-4)
    assert torch.allclose(thin.step(7), slow.step(7), atol=1e-4)
    slow.reset()
    thin.reset()
    assert torch.allclose(thin.step(9), slow.step(9), atol=1e-4)


def test_files_in_bfloat16_stay_so_for_a_float32_computation(tmp_path: Path) -> None:
    narrow = save_random_model(tmp_path / "narrow", dtype=torch.bfloat16)
    wide = save_random_model(tmp_path / "wide", dtype=torch.float32)
    assert load_for_decoding(narrow, torch.float32).dtype == torch.bfloat16
    assert load_for_decoding(wide, torch.float32).dtype == torch.float32
    assert load_for_decoding(wide, torch.bfloat16).dtype == torch.bfloat16
    microscale.save(microscale.quantize(narrow, "int4/32:fp32:amax"), tmp_path / "packed")
    assert load_for_decoding(tmp_path / "packed", torch.float32).dtype == torch.bfloat16
    tokens = torch.arange(64).reshape(2, 32) % 50
    microscale.save(
        microscale.quantize(narrow, "mxfp4", method="rtn+lowrank:rank=4", calibration=tokens), tmp_path / "on"
    )
    stored = load_file(tmp_path / "on/model.safetensors")
    assert any("low_rank" in name and tensor.dtype == torch.float32 for name, tensor in stored.items())
    assert load_for_decoding(tmp_path / "on", torch.float32).dtype == torch.bfloat16  # those are no weights


def test_a_broken_model_is_refused(random_path: Path) -> None:
    model, tokenizer = load(random_path, None, None), microscale.load_tokenizer(random_path)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        generate_text(model, tokenizer, "The sea", max_new_tokens=3)
    with pytest.raises(TextError, match="positions"):
        generate_text(model, tokenizer, "The sea", max_new_tokens=300)


def test_choosing() -> None:
    logits = torch.tensor([0.0, 3.0, 3.0, -1.0])
    randomness = torch.Generator().manual_seed(0)
    assert choose_token(logits, Sampling(), randomness) == 1
    drawn = {choose_token(logits, Sampling(temperature=1.0, top_k=2), randomness) for _ in range(50)}
    assert drawn == {1, 2}
    assert {choose_token(logits, Sampling(temperature=9.0, top_p=0.0), randomness) for _ in range(20)} <= {1, 2}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match="not finite"):
            choose_token(torch.tensor([0.0, bad, 1.0]), Sampling(temperature=1.0), randomness)
