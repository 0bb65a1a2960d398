"""Continue a prompt by a model that is loaded, or that is read from a directory or by its hub name."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microscale.errors import OptionError
from microscale.formats.dtypes import parse_dtype
from microscale.integrations.chat import chat_prompt, check_template, has_template
from microscale.integrations.engines import Engine, load_for_decoding, make_engine
from microscale.integrations.generation import Generation, encode_prompt, generate_text
from microscale.jobs.given_model import label_of, tokenizer_of
from microscale.jobs.reporting import SILENT, Reporter
from microscale.jobs.runtime import RuntimeFacts, float_weights, runtime_facts
from microscale.jobs.small_options import GenerateOptions
from microscale.kernels import count_executions
from microscale.layerwise.devices import chosen_device, moved, on_device


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateResult:
    """The new text, how long it took, and who made it; loading and preparing took ``start_seconds`` of ``seconds``."""

    model: str
    prompt: str
    generation: Generation
    runtime: RuntimeFacts
    start_seconds: float
    seconds: float
    notes: tuple[str, ...] = ()

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
            "notes": self.notes,
            **dataclasses.asdict(self.runtime),
        }


NEVER_BEGUN = (
    "the model ended its text at once. It was made for chats: try --chat (chat=True in Python), which writes the prompt"
    " by its template"
)
INTERACTIVE_POSITIONS = 4096
"""How many tokens a conversation may have, where the model has positions for more."""


def generate(options: GenerateOptions, reporter: Reporter = SILENT) -> GenerateResult:
    """Continue a prompt, or answer it as in a chat, greedily or by chance; the same seed gives the same text.

    Raises:
        CheckpointError, ModelError: no model, no tokenizer, or one whose logits are not finite.
        TextError: a prompt without tokens, or longer than the model's positions; a chat without a template.
        OptionError: no prompt, or what is told first without a chat.
        DtypeError: a dtype that is none.
    """
    del reporter  # the text itself is the progress
    if options.prompt is None:
        raise OptionError("generate needs a prompt: a text to continue, or with --chat to answer")
    started = time.perf_counter()
    is_loaded = not isinstance(options.model, str | Path)
    with on_device(options.model, chosen_device(options.device)) if is_loaded else contextlib.nullcontext():
        conversation = Conversation(options, first=options.prompt)
        start_seconds = time.perf_counter() - started
        with count_executions() as counts, float_weights(conversation.engine):
            found = conversation.reply(options.prompt)
    return GenerateResult(
        model=label_of(options.model),
        prompt=options.prompt,
        generation=found,
        runtime=runtime_facts(conversation.engine, counts),
        start_seconds=start_seconds,
        seconds=time.perf_counter() - started,
        notes=conversation.notes,
    )


class Conversation:
    """A model that answers one message after the other, or continues one prompt where no chat was asked for.

    ``first`` is the first prompt where it is known: what cannot be generated is refused before the model is prepared,
    and there is room for that prompt alone. Else there is room for :data:`INTERACTIVE_POSITIONS` tokens.

    Raises:
        OptionError, TextError, ModelError, CheckpointError: see :func:`generate`.
    """

    def __init__(self, options: GenerateOptions, *, first: str | None = None) -> None:
        if options.system is not None and not options.chat:
            raise OptionError("system is what a chat begins with: give --chat too (chat=True in Python)")
        self._options = options
        self._messages: list[dict[str, str]] = []
        if options.system is not None:
            self._messages.append({"role": "system", "content": options.system})
        self.notes: tuple[str, ...] = ()
        model, dtype, device = options.model, parse_dtype(options.dtype), chosen_device(options.device)
        self.tokenizer = tokenizer_of(model, options.tokenizer)
        if options.chat:
            check_template(self.tokenizer)
        if isinstance(model, str | Path):
            model = moved(load_for_decoding(model, dtype), device)
        else:
            dtype = model.dtype
        self._config = model.config
        limit = getattr(model.config, "max_position_embeddings", None)
        self._positions = min(INTERACTIVE_POSITIONS, limit) if isinstance(limit, int) else INTERACTIVE_POSITIONS
        if first is not None:
            self._positions = len(self._ids(first)) + options.max_new_tokens
        self.engine: Engine = make_engine(model, positions=self._positions, compute_dtype=dtype)

    def reply(self, text: str) -> Generation:
        """Answer a message, or continue a text; of a conversation that gets too long the first exchanges are left out.

        Raises:
            TextError, ModelError: see :func:`generate`.
        """
        options = self._options
        while len(self._prompt(text)) + options.max_new_tokens > self._positions and self._forget():
            pass
        ids = self._ids(text)
        found = generate_text(
            self.engine,
            self.tokenizer,
            ids,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            on_text=options.on_text or (lambda piece: None),
        )
        if options.chat:
            self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": found.text}]
        elif not found.text.strip() and has_template(self.tokenizer):
            self.notes = (NEVER_BEGUN,)
        return found

    def _ids(self, text: str) -> list[int]:
        return encode_prompt(self.tokenizer, self._prompt(text), self._config, self._options.max_new_tokens)

    def _prompt(self, text: str) -> str | list[int]:
        """Return the text to continue, or the tokens of the chat up to its answer."""
        if not self._options.chat:
            return text
        return chat_prompt(self.tokenizer, [*self._messages, {"role": "user", "content": text}])

    def _forget(self) -> bool:
        """Leave the first exchange out; whether there was one."""
        first = next((i for i, message in enumerate(self._messages) if message["role"] == "user"), None)
        if first is None:
            return False
        del self._messages[first : first + 2]
        self.notes = ("the conversation is longer than there is room for: its first exchanges are left out",)
        return True
