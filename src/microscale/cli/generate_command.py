"""``microscale generate``: text from a checkpoint, token by token."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from microscale.cli.eval_command import DtypeOption
from microscale.cli.output import JsonOption, SeedOption, command, console, print_json
from microscale.nn import cached_weights, prepare_for_inference


@command
def generate(
    path: Annotated[str, typer.Argument(help="Checkpoint directory (quantized or not), or hub name.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token; higher samples.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this probability mass.")] = 1.0,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """Continue a prompt; the text appears as it is generated.

    Example: `microscale generate OUT "The sea was" -n 40`
    """
    from microscale.integrations.generation import generate_text
    from microscale.integrations.loading import load_model, load_tokenizer, parse_dtype

    tokenizer = load_tokenizer(path)
    model = load_model(path, dtype=parse_dtype(dtype))
    prepare_for_inference(model)

    pending = [prompt]  # printed with the first piece, so that an error stands alone

    def show(piece: str) -> None:
        if not as_json:
            sys.stdout.write((pending.pop() if pending else "") + piece)
            sys.stdout.flush()

    started = time.perf_counter()
    with cached_weights(model):
        text, num_tokens = generate_text(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            on_text=show,
        )
    seconds = time.perf_counter() - started
    if as_json:
        print_json({"model": path, "prompt": prompt, "text": text, "tokens": num_tokens, "seconds": seconds})
        return
    show("\n")
    console.print(f"[dim]{num_tokens} tokens in {seconds:.1f} s[/dim]")
