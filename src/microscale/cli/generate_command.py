"""``microscale generate``: text from a checkpoint, token by token."""

from __future__ import annotations

import dataclasses
import sys

from microscale.cli.output import JsonOption, console, print_json, tell_missing_kernels
from microscale.cli.parameters import job_command
from microscale.cli.reporter import ConsoleReporter
from microscale.cli.runtime import runtime_text
from microscale.errors import counted
from microscale.jobs.small_options import GenerateOptions


@job_command(GenerateOptions)
def generate(options: GenerateOptions, as_json: JsonOption = False) -> None:
    """Continue a prompt; the text appears as it is generated.

    Example: `microscale generate OUT "The sea was" -n 40`
    """
    from microscale.jobs.generate import generate as generate_job

    tell_missing_kernels()
    pending = [options.prompt]  # printed with the first piece, so that an error stands alone

    def show(piece: str) -> None:
        sys.stdout.write((pending.pop() if pending else "") + piece)
        sys.stdout.flush()

    result = generate_job(options if as_json else dataclasses.replace(options, on_text=show), ConsoleReporter())
    if as_json:
        print_json(result)
        return
    show("\n")
    found = result.generation
    seconds = found.prefill_seconds + found.decode_seconds
    console.print(
        f"[dim]{counted(len(found.tokens), 'token')} in {seconds:.1f} s: prompt {found.prefill_speed:.1f} tokens/s, new"
        f" {found.decode_speed:.1f} tokens/s ({runtime_text(result.runtime)})[/dim]",
        soft_wrap=True,
    )
