"""Streamed text generation through transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from microscale.errors import ModelError, TextError


class _CallbackStreamer(TextStreamer):
    """Hands finished pieces of text to a function instead of printing them."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass a piece on."""
        del stream_end
        self._on_text(text)


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda text: None,
) -> tuple[str, int]:
    """Continue a prompt; returns the new text and its number of tokens. ``temperature`` 0 is greedy.

    A BOS token is put first where the tokenizer has one of its own and does not add it.

    Raises:
        TextError: a prompt without tokens, or longer than the model's positions.
        ModelError: logits that are not numbers (a broken or poisoned model).
    """
    ids: list[int] = tokenizer(prompt)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and bos != tokenizer.eos_token_id and ids[:1] != [bos]:
        ids = [bos, *ids]
    if not ids:
        raise TextError("the prompt is empty and the tokenizer has no BOS token to begin with; write a prompt")
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and len(ids) + max_new_tokens > limit:
        raise TextError(
            f"prompt ({len(ids)} tokens) and new tokens ({max_new_tokens}) exceed the model's {limit} positions;"
            " shorten the prompt or lower --max-new-tokens"
        )
    inputs = torch.tensor([ids], device=model.device)
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    with torch.inference_mode():
        if not bool(torch.isfinite(model(input_ids=inputs).logits[:, -1]).all()):
            raise ModelError(
                "the model's logits are not finite, so it cannot generate; check it with `microscale eval`"
            )
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            streamer=_CallbackStreamer(tokenizer, on_text),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    new_ids = output[0, len(ids) :]
    return tokenizer.decode(new_ids, skip_special_tokens=True), int(new_ids.numel())
