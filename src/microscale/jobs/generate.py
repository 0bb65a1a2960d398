"""Continue a prompt by a model that is loaded, or that is read from a directory or by its hub name."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microscale.formats.dtypes import parse_dtype
from microscale.integrations.engines import Engine, load_for_decoding, make_engine
from microscale.integrations.generation import Generation, encode_prompt, generate_text
from microscale.jobs.given_model import label_of, tokenizer_of
from microscale.jobs.reporting import SILENT, Reporter
from microscale.jobs.runtime import RuntimeFacts, float_weights, runtime_facts
from microscale.jobs.small_options import GenerateOptions
from microscale.kernels import count_executions


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """The new text, how long it took, and who made it; loading and preparing took ``start_seconds`` of ``seconds``."""

    model: str
    prompt: str
    generation: Generation
    runtime: RuntimeFacts
    start_seconds: float
    seconds: float

    @property
    def text(self) -> str:
        """The new text, without the prompt."""
        return self.generation.text

    def as_json(self) -> dict[str, Any]:
        """Return the text, its speed and who made it in one object."""
        found = self.generation
        return {
            "model": self.model,
            "prompt": self.prompt,
            "text": found.text,
            "tokens": len(found.tokens),
            "prompt_tokens": found.prompt_tokens,
            "start_seconds": self.start_seconds,
            "prefill_seconds": found.prefill_seconds,
            "decode_seconds": found.decode_seconds,
            "prefill_tokens_per_second": found.prefill_speed,
            "decode_tokens_per_second": found.decode_speed,
            "seconds": self.seconds,
            **dataclasses.asdict(self.runtime),
        }


def generate(options: GenerateOptions, reporter: Reporter = SILENT) -> GenerateResult:
    """Continue a prompt, greedily or by chance; the same seed gives the same text.

    Raises:
        CheckpointError, ModelError: no model, no tokenizer, or one whose logits are not finite.
        TextError: a prompt without tokens, or longer than the model's positions.
        DtypeError: a dtype that is none.
    """
    del reporter  # the text itself is the progress
    started = time.perf_counter()
    tokenizer, engine = _start(options)
    start_seconds = time.perf_counter() - started
    with count_executions() as counts, float_weights(engine):
        found = generate_text(
            engine,
            tokenizer,
            options.prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            on_text=options.on_text or (lambda text: None),
        )
    seconds = time.perf_counter() - started
    return GenerateResult(
        model=label_of(options.model),
        prompt=options.prompt,
        generation=found,
        runtime=runtime_facts(engine, counts),
        start_seconds=start_seconds,
        seconds=seconds,
    )


def _start(options: GenerateOptions) -> tuple[Any, Engine]:
    """Return the tokenizer and the engine; what cannot be generated is refused before the engine is made."""
    model, dtype = options.model, parse_dtype(options.dtype)
    tokenizer = tokenizer_of(model, options.tokenizer)
    if isinstance(model, str | Path):
        model = load_for_decoding(model, dtype)
    else:
        dtype = model.dtype
    ids = encode_prompt(tokenizer, options.prompt, model.config, options.max_new_tokens)
    return tokenizer, make_engine(model, positions=len(ids) + options.max_new_tokens, compute_dtype=dtype)
