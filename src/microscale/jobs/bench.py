"""Measure how many tokens per second a model takes in and gives out on this machine, and say what ran."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from microscale.errors import DtypeError, ModelError, ShapeError, counted
from microscale.formats import ActivationSpec, RangeKind, format_name, parse_activation, parse_format
from microscale.formats.dtypes import dtype_name, parse_dtype
from microscale.integrations.engines import DecoderEngine, Engine, load_for_decoding, make_engine
from microscale.integrations.random_models import parse_shape, random_llama
from microscale.jobs.reporting import SILENT, Reporter
from microscale.jobs.runtime import RuntimeFacts, float_weights, runtime_facts
from microscale.jobs.small_options import BenchOptions
from microscale.kernels import count_executions
from microscale.layerwise.devices import chosen_device, moved
from microscale.nn.decoder import Decoder
from microscale.nn.linear import QuantizedLinear
from microscale.nn.sizes import module_bytes
from microscale.planning.bench import Speeds, measure_speed, resident_bytes
from microscale.recipes.apply import set_activations

TIMED_STEPS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderFacts:
    """What only the decoder runtime knows: how its linear layers run, and the bytes that it reads and keeps."""

    linear_layers: Mapping[str, int]
    weight_bytes_per_second: float
    cache_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutedModel:
    """What ran: linear layers by the format of their weights and of their inputs, and by whom."""

    formats: Mapping[str, int]
    activations: Mapping[str, int]
    weight_bytes_per_token: int
    runtime: RuntimeFacts
    decoder: DecoderFacts | None

    def as_json(self) -> dict[str, Any]:
        """Return all facts in one object."""
        found = dataclasses.asdict(self)
        runtime, decoder = found.pop("runtime"), found.pop("decoder")
        return {**found, **runtime, **(decoder or {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """What was asked for, what ran, and how fast; ``start_seconds`` is the time before the first token.

    ``milliseconds_per_token`` is the median of each kind of call in a step, None where transformers runs the model.
    """

    requested: BenchOptions
    executed: ExecutedModel
    speeds: Speeds
    milliseconds_per_token: Mapping[str, float] | None
    start_seconds: float
    resident_bytes: int

    @property
    def label(self) -> str:
        """Where the model lies, or the shape of a random one."""
        return str(self.requested.model or f"random llama {self.requested.random_llama}")

    def as_json(self) -> dict[str, Any]:
        """Return all numbers in one object."""
        options = self.requested
        requested = {name: getattr(options, name) for name in ("format", "activations", "dtype", "cache", "threads")}
        return {
            "requested": {"model": self.label, **requested},
            "executed": self.executed,
            "start_seconds": self.start_seconds,
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
            "repeat": options.repeat,
            "prefill": self.speeds.prefill,
            "decode": self.speeds.decode,
            "milliseconds_per_token": self.milliseconds_per_token,
            "resident_bytes": self.resident_bytes,
        }


def bench(options: BenchOptions, reporter: Reporter = SILENT) -> BenchResult:
    """Measure tokens per second of a prompt (prefill) and of single tokens after it (decode).

    Raises:
        ModelError: no model or two, one that cannot be loaded, or activations that it cannot have.
        DtypeError: a dtype that is none, or that the cache does not take.
        ShapeError: more tokens than the model has positions.
    """
    dtype, cache_dtype, device = parse_dtype(options.dtype), parse_dtype(options.cache), chosen_device(options.device)
    if cache_dtype == torch.float16:
        raise DtypeError("the cache is float32 or bfloat16, got float16")
    with _threads(options.threads):
        positions = options.prompt_tokens + options.new_tokens
        started = time.perf_counter()
        model = moved(_open(options, dtype), device)
        formats, activations, num_bytes = _layers(model)
        vocabulary = int(model.config.get_text_config().vocab_size)
        engine = make_engine(model, positions=positions, compute_dtype=dtype, cache_dtype=cache_dtype)
        del model  # the decoder holds what it needs
        start_seconds = time.perf_counter() - started
        with reporter.stage("measuring") as advance, float_weights(engine), count_executions() as counts:
            speeds = measure_speed(
                engine,
                vocabulary=vocabulary,
                prompt_tokens=options.prompt_tokens,
                new_tokens=options.new_tokens,
                repeat=options.repeat,
                seed=options.seed,
                progress=advance,
            )
            shares = _shares(engine, vocabulary)
        executed = ExecutedModel(
            formats=formats,
            activations=activations,
            weight_bytes_per_token=engine.decoder.weight_bytes if isinstance(engine, DecoderEngine) else num_bytes,
            runtime=runtime_facts(engine, counts),
            decoder=_decoder_facts(engine.decoder, speeds) if isinstance(engine, DecoderEngine) else None,
        )
    return BenchResult(
        requested=options,
        executed=executed,
        speeds=speeds,
        milliseconds_per_token=shares,
        start_seconds=start_seconds,
        resident_bytes=resident_bytes(),
    )


@contextlib.contextmanager
def _threads(number: int | None) -> Generator[None, None, None]:
    """Compute with so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open(options: BenchOptions, dtype: torch.dtype) -> Any:
    """Return the model that is asked for, with the activations that are asked for."""
    spec = None if options.activations in (None, "none") else parse_activation(options.activations)
    positions = options.prompt_tokens + options.new_tokens
    if (options.model is None) == (options.random_llama is None):
        raise ModelError("give a model, or --random-llama and no model")
    if options.random_llama is not None:
        fmt = None if options.format is None else parse_format(options.format)
        shape = parse_shape(options.random_llama)
        model = random_llama(shape, fmt, spec, positions=positions, seed=options.seed)
    elif options.format is not None:
        raise ModelError("--format belongs to --random-llama; quantize a model with `microscale quantize`")
    else:
        assert options.model is not None
        model = load_for_decoding(options.model, dtype)
    if options.activations is not None:
        _change_activations(model, spec)
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and positions > limit:
        raise ShapeError(
            f"prompt and new tokens ({positions}) exceed the model's {counted(limit, 'position')}; lower them"
        )
    return model


def _change_activations(model: Any, spec: ActivationSpec | None) -> None:
    """Give all packed layers another activation format; refuse a range that needs calibration."""
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ModelError("--activations needs packed layers, and this model has none; quantize it first")
    if spec is not None and spec.range is RangeKind.STATIC:
        raise ModelError(f"activations {spec} need a calibrated range; choose a dynamic format")
    set_activations(model, spec)


def _layers(model: Any) -> tuple[dict[str, int], dict[str, int], int]:
    """Count the formats and activation settings of the linear layers, and the bytes of their weights."""
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    plain = [module for module in model.modules() if type(module) is torch.nn.Linear]
    formats = Counter(format_name(module.format) for module in packed)
    formats.update(dtype_name(module.weight.dtype) for module in plain)
    activations = Counter("none" if m.activations is None else str(m.activations.spec) for m in packed)
    return dict(formats), dict(activations), sum(map(module_bytes, (*packed, *plain)))


def _decoder_facts(decoder: Decoder, speeds: Speeds) -> DecoderFacts:
    return DecoderFacts(
        linear_layers={execution.value: count for execution, count in decoder.executions.items()},
        weight_bytes_per_second=speeds.bytes_per_second(decoder.weight_bytes),
        cache_bytes=decoder.cache_bytes,
    )


def _shares(engine: Engine, vocabulary: int) -> dict[str, float] | None:
    """Return the median time of each kind of call in a step, and of all between the calls; None for transformers."""
    if not isinstance(engine, DecoderEngine):
        return None
    decoder = engine.decoder
    decoder.num_tokens = min(decoder.num_tokens, decoder.positions) - 1
    kinds: dict[str, list[float]] = {}
    wholes: list[float] = []
    for count in range(TIMED_STEPS):
        for kind, seconds in decoder.timed_step(count % vocabulary).items():
            kinds.setdefault(kind, []).append(seconds)
        decoder.num_tokens -= 1
        started = time.perf_counter()
        decoder.step(count % vocabulary)
        wholes.append(time.perf_counter() - started)
        decoder.num_tokens -= 1
    shares = {name: 1e3 * sorted(values)[TIMED_STEPS // 2] for name, values in kinds.items()}
    whole = 1e3 * sorted(wholes)[TIMED_STEPS // 2]
    return {**shares, "rest": max(whole - sum(shares.values()), 0.0), "whole": whole}
