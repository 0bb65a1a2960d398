"""``microscale bench``: how many tokens per second a model takes in and gives out on this machine."""

from __future__ import annotations

import time
from collections import Counter
from typing import Annotated, Any

import torch
import typer

from microscale.cli.eval_command import DtypeOption
from microscale.cli.output import (
    Column,
    JsonOption,
    SeedOption,
    command,
    console,
    print_json,
    print_table,
    progress_bar,
    tell_missing_kernels,
)
from microscale.cli.runtime import engine_facts, float_weights, runtime_text
from microscale.errors import DtypeError, ModelError, ShapeError
from microscale.formats import ActivationSpec, RangeKind, format_name, parse_activation, parse_format
from microscale.kernels.cpu.decoder import StepKind
from microscale.nn import QuantizedLinear
from microscale.planning.bench import BenchResult, Speed, measure_speed, resident_bytes
from microscale.recipes.apply import set_activations

TIMED_STEPS = 24


@command
def bench(
    path: Annotated[str | None, typer.Argument(help="Checkpoint directory (quantized or not), or hub name.")] = None,
    random_llama: Annotated[
        str | None,
        typer.Option(
            "--random-llama",
            help="Bench a random model, e.g. hidden=1536,ffn=4096,layers=12,heads=12,kv_heads=4,vocab=512.",
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="Format of the random model's weights (default bfloat16).")
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            "--activations",
            "-a",
            help="Format of layer inputs, or `none`; int8/32:fp32:amax is the fast one. Default: the checkpoint's.",
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of the prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="Tokens after it, one by one.")] = 128,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="How often both are measured.")] = 5,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads (default: torch's number).")] = None,
    cache: Annotated[str, typer.Option("--cache", help="Keys and values are kept in float32 or bfloat16.")] = "float32",
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """Measure tokens per second of a prompt (prefill) and of single tokens after it (decode).

    Example: `microscale bench OUT --prompt-tokens 256 --new-tokens 128 --activations int8/32:fp32:amax`
    """
    from microscale.integrations.engines import make_engine
    from microscale.integrations.loading import parse_dtype

    tell_missing_kernels()
    if threads is not None:
        torch.set_num_threads(threads)
    compute_dtype, cache_dtype = parse_dtype(dtype), parse_dtype(cache)
    if cache_dtype == torch.float16:
        raise DtypeError("the cache is float32 or bfloat16, got float16")
    positions = prompt_tokens + new_tokens
    started = time.perf_counter()
    spec = None if activations in (None, "none") else parse_activation(activations)
    model = _load(path, random_llama, format, spec, compute_dtype, positions, seed)
    if activations is not None:
        _change_activations(model, spec)
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and positions > limit:
        raise ShapeError(f"prompt and new tokens ({positions}) exceed the model's {limit} positions; lower them")
    executed = _model_facts(model)
    vocabulary = int(model.config.get_text_config().vocab_size)
    engine = make_engine(model, positions=positions, compute_dtype=compute_dtype, cache_dtype=cache_dtype)
    del model  # the decoder holds what it needs
    start_seconds = time.perf_counter() - started
    with progress_bar("measuring") as advance, float_weights(engine):
        result = measure_speed(
            engine,
            vocabulary=vocabulary,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeat=repeat,
            seed=seed,
            progress=advance,
        )
        shares = _shares(engine, vocabulary)
    requested = {
        "model": path or f"random llama {random_llama}",
        "format": format,
        "activations": activations,
        "dtype": dtype,
        "cache": cache,
        "threads": threads,
    }
    executed |= engine_facts(engine) | _decoder_facts(engine, result)
    answer = {"requested": requested, "executed": executed, "start_seconds": start_seconds}
    answer |= {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeat": repeat}
    answer |= {"prefill": _speed_facts(result.prefill), "decode": _speed_facts(result.decode)}
    answer |= {"milliseconds_per_token": shares, "resident_bytes": resident_bytes()}
    if as_json:
        print_json(answer)
    else:
        _show(answer, result)


def _load(
    path: str | None,
    shape: str | None,
    format: str | None,
    activations: ActivationSpec | None,
    dtype: torch.dtype,
    positions: int,
    seed: int,
) -> Any:
    from microscale.integrations.engines import load_for_decoding
    from microscale.integrations.random_models import parse_shape, random_llama

    if (path is None) == (shape is None):
        raise ModelError("give a model, or --random-llama and no model")
    if path is not None:
        if format is not None:
            raise ModelError("--format belongs to --random-llama; quantize a model with `microscale quantize`")
        return load_for_decoding(path, dtype)
    assert shape is not None
    fmt = None if format is None else parse_format(format)
    return random_llama(parse_shape(shape), fmt, activations, positions=positions, seed=seed)


def _change_activations(model: Any, spec: ActivationSpec | None) -> None:
    """Give all packed layers another activation format.

    Raises:
        ModelError: no layer is packed, or a range that needs calibration.
    """
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ModelError("--activations needs packed layers, and this model has none; quantize it first")
    if spec is not None and spec.range is RangeKind.STATIC:
        raise ModelError(f"activations {spec} need a calibrated range; choose a dynamic format")
    set_activations(model, spec)


def _model_facts(model: Any) -> dict[str, Any]:
    """Count the formats and activation settings of the linear layers."""
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    plain = [module for module in model.modules() if type(module) is torch.nn.Linear]
    formats = Counter(format_name(module.format) for module in packed)
    formats.update(str(module.weight.dtype).removeprefix("torch.") for module in plain)
    rounding = Counter("none" if m.activations is None else str(m.activations.spec) for m in packed)
    num_bytes = sum(module.num_bytes for module in packed)
    num_bytes += sum(module.weight.numel() * module.weight.element_size() for module in plain)
    return {"formats": dict(formats), "activations": dict(rounding), "weight_bytes_per_token": num_bytes}


def _decoder_facts(engine: Any, result: BenchResult) -> dict[str, Any]:
    """Return what only the decoder knows, and the bytes of weights that it reads per second."""
    facts: dict[str, Any] = {}
    decoder = getattr(engine, "decoder", None)
    if decoder is not None:
        facts["linear_layers"] = {execution.value: count for execution, count in decoder.executions.items()}
        facts["weight_bytes_per_token"] = decoder.weight_bytes
        facts["weight_bytes_per_second"] = result.bytes_per_second(decoder.weight_bytes)
        facts["cache_bytes"] = decoder.cache_bytes
    return facts


def _shares(engine: Any, vocabulary: int) -> dict[str, float] | None:
    """Return the median time of each kind of call in a step, and of all between the calls; None for transformers."""
    decoder = getattr(engine, "decoder", None)
    if decoder is None:
        return None
    decoder.num_tokens = min(decoder.num_tokens, decoder.positions) - 1
    kinds: dict[str, list[float]] = {kind.value: [] for kind in StepKind}
    wholes: list[float] = []
    for count in range(TIMED_STEPS):
        for kind, seconds in decoder.timed_step(count % vocabulary).items():
            kinds[kind.value].append(seconds)
        decoder.num_tokens -= 1
        started = time.perf_counter()
        decoder.step(count % vocabulary)
        wholes.append(time.perf_counter() - started)
        decoder.num_tokens -= 1
    shares = {name: 1e3 * sorted(values)[TIMED_STEPS // 2] for name, values in kinds.items()}
    whole = 1e3 * sorted(wholes)[TIMED_STEPS // 2]
    return {**shares, "rest": max(whole - sum(shares.values()), 0.0), "whole": whole}


def _speed_facts(speed: Speed) -> dict[str, Any]:
    facts = {"median": speed.median, "min": speed.lowest, "max": speed.highest}
    return {"tokens_per_second": facts | {"values": list(speed.values)}}


def _show(answer: dict[str, Any], result: BenchResult) -> None:
    executed = answer["executed"]
    columns = [Column(title="tokens/s"), *(Column(title=name, is_number=True) for name in ("median", "min", "max"))]
    rows = [
        [f"{name} ({count})", f"{speed.median:.1f}", f"{speed.lowest:.1f}", f"{speed.highest:.1f}"]
        for name, count, speed in (
            ("prefill", result.prompt_tokens, result.prefill),
            ("decode", result.new_tokens, result.decode),
        )
    ]
    print_table(answer["requested"]["model"], columns, rows)
    lines = [f"ran by: {runtime_text(executed)}"]
    counted = {"weights": executed["formats"], "activations": executed["activations"]}
    counted |= {"linear layers": executed["linear_layers"]} if "linear_layers" in executed else {}
    lines += [f"{name}: " + ", ".join(f"{word} × {n}" for word, n in found.items()) for name, found in counted.items()]
    read = f"weights read per token: {executed['weight_bytes_per_token'] / 1e6:.1f} MB"
    if "weight_bytes_per_second" in executed:
        read += f", {executed['weight_bytes_per_second'] / 1e9:.1f} GB/s"
    lines.append(read)
    shares = answer["milliseconds_per_token"]
    if shares is not None:
        lines.append("ms per token: " + ", ".join(f"{name} {value:.2f}" for name, value in shares.items()))
    lines.append(f"resident memory: {answer['resident_bytes'] / 1e6:.0f} MB; start: {answer['start_seconds']:.1f} s")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
