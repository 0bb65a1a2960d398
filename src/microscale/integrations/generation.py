"""Streamed text generation: by the decoder runtime where it runs the model, else by transformers.

Both runtimes give transformers' own tokens: greedy is the first largest logit; sampling divides by the temperature,
keeps the ``top_k`` likeliest tokens (the model's generation config, 50 by default, as in transformers), then the
smallest set with probability ``top_p``, and draws with torch's generator. Either stops after an end token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TextStreamer

from microscale.errors import ModelError, TextError, counted
from microscale.families.batch import Batch
from microscale.families.running import predict
from microscale.integrations.engines import DecoderEngine, Engine, Runtime, TransformersEngine, make_engine
from microscale.kernels import largest_index

DEFAULT_TOP_K = 50
"""What transformers takes where the generation config says nothing."""


class _CallbackStreamer(TextStreamer):
    """Hands finished pieces of text to a function instead of printing them, and notes when tokens came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt, then every new token."""
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass a piece on."""
        self._on_text(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """New text with its tokens, who made it, and how long prompt and new tokens took.

    ``decode_seconds`` covers all new tokens but the first, which the prompt yields.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    runtime: Runtime
    why_not_decoder: str | None

    @property
    def prefill_speed(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_speed(self) -> float:
        """New tokens per second, 0 where there was only one."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


def encode_prompt(tokenizer: Any, prompt: str | Sequence[int], config: Any, max_new_tokens: int) -> list[int]:
    """Return the tokens of a prompt; BOS comes first where the tokenizer has one of its own and does not add it.

    Token ids are taken as they are.

    Raises:
        TextError: a prompt without tokens, or longer than the model's positions.
    """
    ids: list[int] = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
    bos = tokenizer.bos_token_id if isinstance(prompt, str) else None
    if bos is not None and bos != tokenizer.eos_token_id and ids[:1] != [bos]:
        ids = [bos, *ids]
    if not ids:
        raise TextError("the prompt is empty and the tokenizer has no BOS token to begin with; write a prompt")
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and len(ids) + max_new_tokens > limit:
        raise TextError(
            f"prompt ({counted(len(ids), 'token')}) and new tokens ({max_new_tokens}) exceed the"
            f" model's {counted(limit, 'position')};"
            " shorten the prompt or lower --max-new-tokens"
        )
    return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen: temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int = DEFAULT_TOP_K
    top_p: float = 1.0

    def options(self) -> dict[str, Any]:
        """Return the same choice for transformers."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def choose_token(logits: Float[Tensor, "vocabulary"], sampling: Sampling, randomness: torch.Generator) -> int:
    """Choose the next token.

    Raises:
        ModelError: NaN or +Inf among the logits.
    """
    best = largest_index(logits)
    if not float(logits[best]) < float("inf"):
        raise _not_finite()
    if sampling.temperature == 0:
        return best
    scores = logits / sampling.temperature
    if sampling.top_k:
        worst = torch.topk(scores, min(sampling.top_k, scores.numel())).values[-1]
        scores = scores.masked_fill(scores < worst, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = torch.sort(scores)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[-1] = False
        scores = scores.masked_fill(dropped.scatter(0, order, dropped), -torch.inf)
    return int(torch.multinomial(scores.softmax(-1), 1, generator=randomness))


def _not_finite() -> ModelError:
    return ModelError("the model's logits are not finite, so it cannot generate; check it with `microscale eval`")


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generation:
    """Continue a prompt, a text or token ids; ``temperature`` 0 is greedy.

    ``model`` is a transformers model, or an :data:`~microscale.integrations.engines.Engine` made of one.

    Raises:
        TextError: a prompt without tokens, or longer than the model's positions.
        ModelError: logits that are not numbers (a broken or poisoned model).
    """
    if max_new_tokens < 1:
        raise TextError(f"at least 1 new token is generated, got {max_new_tokens}")
    ids = encode_prompt(tokenizer, prompt, model.config, max_new_tokens)
    engine: Engine
    if isinstance(model, DecoderEngine | TransformersEngine):
        engine = model
    else:
        engine = make_engine(model, positions=len(ids) + max_new_tokens)
    top_k = getattr(engine.generation_config, "top_k", None)
    sampling = Sampling(temperature=temperature, top_k=DEFAULT_TOP_K if top_k is None else top_k, top_p=top_p)
    streamer = _CallbackStreamer(tokenizer, on_text)
    if isinstance(engine, DecoderEngine):
        new = _decoder_tokens(engine, ids, max_new_tokens, sampling, seed, streamer)
    else:
        new = _transformers_tokens(engine, tokenizer, ids, max_new_tokens, sampling, seed, streamer)
    ended = time.perf_counter()
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=tuple(new),
        prompt_tokens=len(ids),
        prefill_seconds=streamer.times[1] - streamer.times[0],
        decode_seconds=(ended - streamer.times[1]) if len(new) > 1 else 0.0,
        runtime=engine.runtime,
        why_not_decoder=engine.why_not_decoder,
    )


def _decoder_tokens(
    engine: DecoderEngine,
    ids: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    streamer: _CallbackStreamer,
) -> list[int]:
    ends = end_tokens(engine.generation_config)
    new: list[int] = []
    engine.reset()
    streamer.put(torch.tensor([ids]))
    for token in _chosen_tokens(engine, ids, sampling, torch.Generator().manual_seed(seed)):
        new.append(token)
        streamer.put(torch.tensor([token]))
        if token in ends or len(new) == max_new_tokens:
            break
    streamer.end()
    return new


def _chosen_tokens(
    engine: DecoderEngine, ids: list[int], sampling: Sampling, randomness: torch.Generator
) -> Generator[int, None, None]:
    logits = engine.prefill(ids)
    if not bool(torch.isfinite(logits).all()):
        raise _not_finite()
    while True:
        token = choose_token(logits, sampling, randomness)
        yield token
        logits = engine.step(token)


def end_tokens(generation_config: Any) -> set[int]:
    """Return the tokens after which a text ends."""
    ends = generation_config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, list | tuple) else {int(ends)}


def _transformers_tokens(
    engine: TransformersEngine,
    tokenizer: Any,
    ids: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    streamer: _CallbackStreamer,
) -> list[int]:
    model = engine.model
    inputs = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        if not bool(torch.isfinite(predict(model, Batch(token_ids=inputs))[:, -1]).all()):
            raise _not_finite()
        torch.manual_seed(seed)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling.options(),
        )
    return output[0, len(ids) :].tolist()
