"""``microscale generate``: text from a checkpoint, token by token; or a conversation, line by line."""

from __future__ import annotations

import dataclasses
import sys

from microscale.cli.output import JsonOption, console, error_console, print_json, tell_missing_kernels
from microscale.cli.parameters import job_command
from microscale.cli.reporter import ConsoleReporter
from microscale.cli.runtime import runtime_text
from microscale.errors import counted
from microscale.jobs.small_options import GenerateOptions


@job_command(GenerateOptions)
def generate(options: GenerateOptions, as_json: JsonOption = False) -> None:
    """Continue a prompt, or answer it (`--chat`); the text appears as it is generated.

    Examples: `microscale generate OUT "The sea was" -n 40`, `microscale generate OUT --chat "Why is the sea salty?"`,
    `microscale generate OUT --chat --system "Answer in one sentence."`
    """
    from microscale.jobs.generate import generate as generate_job

    tell_missing_kernels()
    if options.prompt is None and sys.stdin.isatty() and options.chat and not as_json:
        _talk(options)
        return
    if options.prompt is None and not sys.stdin.isatty():
        options = dataclasses.replace(options, prompt=sys.stdin.read().strip() or None)
    pending = [] if options.chat else [options.prompt or ""]  # printed with the first piece: an error stands alone

    def show(piece: str) -> None:
        sys.stdout.write((pending.pop() if pending else "") + piece)
        sys.stdout.flush()

    result = generate_job(options if as_json else dataclasses.replace(options, on_text=show), ConsoleReporter())
    if as_json:
        print_json(result)
        return
    show("\n")
    for note in result.notes:
        error_console.print(f"note: {note}", markup=False, soft_wrap=True)
    found = result.generation
    seconds = found.prefill_seconds + found.decode_seconds
    console.print(
        f"[dim]{counted(len(found.tokens), 'token')} in {seconds:.1f} s: prompt {found.prefill_speed:.1f} tokens/s, new"
        f" {found.decode_speed:.1f} tokens/s ({runtime_text(result.runtime)})[/dim]",
        soft_wrap=True,
    )


def _talk(options: GenerateOptions) -> None:
    """Answer line after line, until an empty one or the end of the input."""
    from microscale.jobs.generate import Conversation

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    conversation = Conversation(dataclasses.replace(options, on_text=show))
    error_console.print("[dim]write a message; an empty line ends the conversation[/dim]")
    told: tuple[str, ...] = ()
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            text = ""
        if not text:
            return
        conversation.reply(text)
        show("\n")
        if conversation.notes != told:
            told = conversation.notes
            error_console.print(f"note: {told[0]}", markup=False, soft_wrap=True)
