"""The decoder runtime against the modules of transformers: families, formats, activations, windows, chunks, threads.

Two bounds. Where no activation is rounded, both float32 computations are compared with the model in float64: the
decoder may be off by no more than 8 times as much as transformers itself (their sums differ in order only). Where
activations are rounded, a number within float error of a tie may round the other way, which moves the logits by far
more than float error does; the bound is then 4 times what four relative perturbations of the embedding by 2^-16 do to
transformers' own logits.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microscale
from kernel_levels import LEVELS
from microscale.errors import ModelError, ShapeError
from microscale.formats import parse_format
from microscale.integrations.decoding import make_decoder, why_not_decoder
from microscale.kernels import Operation, count_executions, dispatch
from microscale.kernels.cpu import native
from microscale.nn.decoder_linear import Execution, rows_stand_alone
from small_models import POSITIONS, same_bits, save_random_model

pytestmark = pytest.mark.skipif(native.NATIVE is None, reason="the compiled kernels are not installed")

TOKENS: list[int] = torch.randint(0, 256, (28,), generator=torch.Generator().manual_seed(3)).tolist()
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
INT8 = "int8/32:fp32:amax"


def small_model(tmp_path: Path, family: str, fmt: str | None = None, act: str | None = None, **changes: Any) -> Any:
    """A random model in float32, its linear layers packed where a format is given."""
    include = changes.pop("include", ())
    path = save_random_model(tmp_path / "model", family, dtype=torch.float32, **changes)
    if fmt is None:
        return microscale.load(path, dtype=torch.float32)
    return microscale.quantize(path, fmt, activations=act, include=include)


def module_logits(model: Any, tokens: list[int] = TOKENS) -> Tensor:
    """Logits [tokens, vocabulary] of the modules."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].double()


def decoder_logits(decoder: Any, tokens: list[int] = TOKENS, prompt: int = 9) -> Tensor:
    """Logits of the decoder from the end of the prompt on: a prefill, then single tokens."""
    decoder.reset()
    found = [decoder.prefill(tokens[:prompt]).clone()]
    found += [decoder.step(token).clone() for token in tokens[prompt:]]
    return torch.stack(found)


def float_bound(model: Any) -> tuple[Tensor, float]:
    """Exact logits, and how far the decoder may be from them."""
    exact = module_logits(copy.deepcopy(model).double())
    return exact, 8 * float((module_logits(model) - exact).abs().max())


def perturbed_bound(model: Any) -> tuple[Tensor, float]:
    """transformers' logits, and how far the decoder may be from them where roundings flip."""
    expected = module_logits(model)
    embedding = model.get_input_embeddings()
    before = embedding.weight.detach().clone()
    moved = 0.0
    for seed in range(4):
        noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(seed)) * 2.0**-16
        embedding.weight.data.copy_(before * (1 + noise))
        moved = max(moved, float((module_logits(model) - expected).abs().max()))
    embedding.weight.data.copy_(before)
    return expected, 4 * moved


def check(model: Any, decoder: Any, *, rounds: bool = False) -> None:
    expected, bound = perturbed_bound(model) if rounds else float_bound(model)
    assert 0 < bound < 0.25 * float(expected.abs().max())  # a bound that could not fail would prove nothing
    for prompt in (9, 1, len(TOKENS)):
        found = decoder_logits(decoder, prompt=prompt)
        assert float((found - expected[prompt - 1 :]).abs().max()) <= bound


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fmt", [None, "mxfp4", "mxfp8", "mxfp4_plus", "nvfp4"])
def test_families_and_weight_formats(tmp_path: Path, family: str, fmt: str | None) -> None:
    model = small_model(tmp_path, family, fmt)
    check(model, make_decoder(model, positions=40))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("act", ["mxfp8", "mxfp4", INT8, "mxint8"])
def test_rounded_activations(tmp_path: Path, family: str, act: str) -> None:
    model = small_model(tmp_path, family, "mxfp4", act)
    decoder = make_decoder(model, positions=40)
    check(model, decoder, rounds=True)
    assert decoder.executions == {Execution.PACKED_ROUNDING: 14, Execution.PLAIN: 1}


@pytest.mark.parametrize(
    "act", ["nvfp4", "e4m3/tensor:fp32", "e4m3/tensor:fp32@ema(0.9)", "e4m3/tensor:fp32@window(3)"]
)
def test_ranges_that_span_tokens_or_calls(tmp_path: Path, act: str) -> None:
    """Scales come from the whole prompt, then from each token: transformers goes the same way with its cache."""
    model = small_model(tmp_path, "llama", "mxfp8", act)
    twin = copy.deepcopy(model)
    decoder = make_decoder(twin, positions=40, chunk=4)
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([TOKENS[:9]]), use_cache=True)
        expected = [output.logits[0, -1]]
        for token in TOKENS[9:]:
            output = model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            expected.append(output.logits[0, -1])
    found = decoder_logits(decoder)
    # fp8 of a tensor is coarse: a flipped rounding moves a product by up to 2^-4 of its size
    scale = float(torch.stack(expected).abs().max())
    assert float((found - torch.stack(expected)).abs().max()) <= 2.0**-4 * scale
    correlation = torch.corrcoef(torch.stack([found.flatten(), torch.stack(expected).flatten()]))[0, 1]
    assert float(correlation) > 0.9999
    for name, module in twin.named_modules():
        if isinstance(getattr(module, "amax", None), Tensor):  # the state moved on as in the modules
            assert torch.allclose(module.amax, model.get_submodule(name).amax, rtol=1e-2, equal_nan=True)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
        ("llama", {"head_dim": 20}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 1e4,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "attention_bias": True}),
    ],
)
@pytest.mark.parametrize("fmt", [None, "mxfp4"])
def test_what_configs_vary(tmp_path: Path, family: str, changes: dict[str, Any], fmt: str | None) -> None:
    model = small_model(tmp_path, family, fmt, **changes)
    check(model, make_decoder(model, positions=40))


def test_packed_embedding_and_head(tmp_path: Path) -> None:
    model = small_model(tmp_path, "llama", "mxfp8", include=("lm_head", "model.embed_tokens"))
    decoder = make_decoder(model, positions=40)
    assert decoder.executions == {Execution.PACKED: 15}
    check(model, decoder)


def test_packed_and_plain_layers_side_by_side(tmp_path: Path) -> None:
    path = save_random_model(tmp_path / "model", "qwen2", dtype=torch.float32)
    rules = ["*.k_proj=mxfp8", "*.layers.1.mlp.up_proj=mxfp6_e2m3"]
    model = microscale.quantize(path, "mxfp4", exclude=["*.v_proj", "*.0.mlp.gate_proj"], rules=rules)
    decoder = make_decoder(model, positions=40)
    assert decoder.executions[Execution.PLAIN] == 2 + 1 + 1  # and the head
    check(model, decoder)


def test_a_format_without_kernel_runs_as_its_module(tmp_path: Path) -> None:
    model = small_model(tmp_path, "llama", "e2m1/16x16:e8m0")
    decoder = make_decoder(model, positions=40)
    assert decoder.executions == {Execution.MODULE: 14, Execution.PLAIN: 1}
    check(model, decoder)


def test_bfloat16_weights_are_the_numbers_that_they_are(tmp_path: Path) -> None:
    path = save_random_model(tmp_path / "model", "qwen3", dtype=torch.bfloat16)
    narrow = make_decoder(microscale.load(path, dtype=torch.bfloat16), positions=40)
    wide = make_decoder(microscale.load(path, dtype=torch.float32), positions=40)
    assert same_bits(decoder_logits(narrow, prompt=1), decoder_logits(wide, prompt=1))
    assert 2 * narrow.weight_bytes == wide.weight_bytes


@pytest.mark.parametrize("chunk", [1, 4, 28])
def test_chunks_of_a_prompt(tmp_path: Path, chunk: int) -> None:
    model = small_model(tmp_path, "qwen3", "mxfp4")
    check(model, make_decoder(model, positions=40, chunk=chunk))


def test_a_bfloat16_cache_is_near(tmp_path: Path) -> None:
    model = small_model(tmp_path, "llama")
    exact = make_decoder(model, positions=40)
    near = make_decoder(model, positions=40, cache_dtype=torch.bfloat16)
    assert 2 * near.cache_bytes == exact.cache_bytes
    expected = decoder_logits(exact)
    distance = float((decoder_logits(near) - expected).abs().max())
    # keys and values are off by 2^-9 of their size; the logits feel it through two layers
    assert 0 < distance <= 16 * 2.0**-9 * float(expected.abs().max())


def test_threads_change_no_bit(tmp_path: Path) -> None:
    model = small_model(tmp_path, "llama", "mxfp4", INT8)
    before = torch.get_num_threads()
    found: list[Tensor] = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(decoder_logits(make_decoder(model, positions=40)))
        finally:
            torch.set_num_threads(before)
    assert same_bits(found[0], found[1]) and same_bits(found[0], found[2])


@pytest.mark.parametrize("level", LEVELS)
def test_levels(tmp_path: Path, level: str) -> None:
    model = small_model(tmp_path, "llama", "mxfp4")
    with native.use_level(level):
        check(model, make_decoder(model, positions=40))


@pytest.mark.parametrize(("family", "fmt"), [("llama", None), ("qwen3", "mxfp4"), ("mistral", "e2m1/16x16:e8m0")])
def test_the_reference_backend_runs_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, fmt: str | None
) -> None:
    model = small_model(tmp_path, family, fmt, sliding_window=7 if family == "mistral" else None)
    monkeypatch.setattr(dispatch, "BACKENDS", dispatch.BACKENDS[-1:])
    decoder = make_decoder(model, positions=40)
    check(model, decoder)
    assert decoder.executions[Execution.MODULE] == (0 if fmt is None else 14)
    assert {call.backend for plan in decoder.plans for call in plan.explain()} == {"reference"}


def test_a_cache_of_a_format_rounds_as_rounded_attention_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(tmp_path, "llama")
    monkeypatch.setattr(dispatch, "BACKENDS", dispatch.BACKENDS[-1:])
    found = decoder_logits(make_decoder(model, positions=40, cache_dtype=parse_format("mxfp4")))
    exact = decoder_logits(make_decoder(model, positions=40))
    expected = module_logits(microscale.quantize_attention(model, kv_cache="mxfp4"))[8:]
    moved = float((exact - expected).abs().max())
    assert float((found - expected).abs().max()) <= 0.05 * moved  # what rounding does, but for flips at ties


def test_who_ran_is_counted(tmp_path: Path) -> None:
    decoder = make_decoder(small_model(tmp_path, "llama", "mxfp4"), positions=40)
    with count_executions() as counts:
        decoder.prefill(TOKENS[:3])
        decoder.step(1)
    assert counts[Operation.ATTEND, "cpu"] == 2 * 2  # two layers, twice
    assert counts[Operation.ADD_RMS_NORM, "cpu"] == 2 * (2 * 2 + 1)
    assert {name for _, name in counts} == {"cpu"}
    reasons = {call.operation: call.passed_over for call in decoder.plans[0].explain()}
    assert reasons[Operation.ADD_RMS_NORM] == {"reference": None}
    assert reasons[Operation.ATTEND] == {"reference": "reads caches in the layout row_major only, not lanes16"}


def test_room_and_reset(tmp_path: Path) -> None:
    model = small_model(tmp_path, "llama")
    decoder = make_decoder(model, positions=10)
    first = decoder_logits(decoder, TOKENS[:10])
    with pytest.raises(ShapeError, match="exceed the decoder's 10 positions"):
        decoder.step(1)
    with pytest.raises(ShapeError, match="exceed the decoder's 10 positions"):
        decoder.prefill([1])
    with pytest.raises(ShapeError, match="at least one token"):
        decoder.prefill([])
    decoder_logits(decoder, list(reversed(TOKENS[:10])))
    assert same_bits(decoder_logits(decoder, TOKENS[:10]), first)
    decoder.reset()
    decoder.prefill(TOKENS[:3])
    decoder.prefill(TOKENS[3:9])  # a prompt in two calls
    assert decoder.num_tokens == 9
    seconds = decoder.timed_step(TOKENS[9])
    assert decoder.num_tokens == 10 and all(value > 0 for value in seconds.values())


def test_long_texts_use_every_position(tmp_path: Path) -> None:
    model = small_model(tmp_path, "llama")
    tokens = (TOKENS * 5)[:POSITIONS]
    exact = module_logits(copy.deepcopy(model).double(), tokens)
    bound = 8 * float((module_logits(model, tokens) - exact).abs().max())
    found = decoder_logits(make_decoder(model, positions=POSITIONS), tokens, prompt=70)
    assert float((found - exact[69:]).abs().max()) <= bound


def test_what_is_refused(tmp_path: Path) -> None:
    gpt2 = microscale.load(save_random_model(tmp_path / "gpt2", "gpt2"), dtype=torch.float32)
    assert "GPT2LMHeadModel" in str(why_not_decoder(gpt2))
    with pytest.raises(ModelError, match="llama, mistral, qwen2, qwen3"):
        make_decoder(gpt2, positions=4)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "'dynamic'" in str(why_not_decoder(small_model(tmp_path / "a", "llama", rope_parameters=dynamic)))
    assert "'relu'" in str(why_not_decoder(small_model(tmp_path / "b", "llama", hidden_act="relu")))
    model = small_model(tmp_path / "c", "llama")
    assert why_not_decoder(model) is None
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert "layers.1 has hooks" in str(why_not_decoder(model))
    handle.remove()
    model.model.layers[0].mlp.extra = nn.Linear(2, 2)
    assert "mlp.extra is not part" in str(why_not_decoder(model))
    del model.model.layers[0].mlp.extra
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)
    assert "up_proj" in str(why_not_decoder(model))


def test_without_kernels_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(tmp_path, "llama")
    monkeypatch.setattr(native, "NATIVE", None)
    monkeypatch.setattr(native, "UNAVAILABLE", "install a C++20 compiler")
    assert why_not_decoder(model) == "install a C++20 compiler"


@pytest.mark.parametrize(
    ("fmt", "alone"),
    [
        ("mxfp8", True),
        (INT8, True),
        ("int8/channel:fp32", True),
        ("nvfp4", False),
        ("e4m3/tensor:fp32", False),
        ("mxfp4+sparse2%:fp16", False),
        ("pair(mxfp4,mxfp8,25%)", False),
    ],
)
def test_which_formats_round_each_row_by_itself(fmt: str, alone: bool) -> None:
    assert rows_stand_alone(parse_format(fmt)) is alone
