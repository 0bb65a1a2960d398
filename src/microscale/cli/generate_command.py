"""``microscale generate``: text from a checkpoint, token by token."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from microscale.cli.eval_command import DtypeOption
from microscale.cli.output import JsonOption, SeedOption, command, console, print_json, tell_missing_kernels
from microscale.cli.runtime import engine_facts, float_weights, runtime_text


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
    from microscale.integrations.engines import load_for_decoding, make_engine
    from microscale.integrations.generation import encode_prompt, generate_text
    from microscale.integrations.loading import load_tokenizer, parse_dtype

    tell_missing_kernels()
    compute_dtype = parse_dtype(dtype)
    started = time.perf_counter()
    tokenizer = load_tokenizer(path)
    model = load_for_decoding(path, compute_dtype)
    ids = encode_prompt(tokenizer, prompt, model.config, max_new_tokens)
    engine = make_engine(model, positions=len(ids) + max_new_tokens, compute_dtype=compute_dtype)
    del model  # the decoder holds what it needs
    start_seconds = time.perf_counter() - started

    pending = [prompt]  # printed with the first piece, so that an error stands alone

    def show(piece: str) -> None:
        if not as_json:
            sys.stdout.write((pending.pop() if pending else "") + piece)
            sys.stdout.flush()

    with float_weights(engine):
        found = generate_text(
            engine,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            on_text=show,
        )
    facts = engine_facts(engine)
    if as_json:
        answer = {"model": path, "prompt": prompt, "text": found.text, "tokens": len(found.tokens)}
        speeds = {
            "prompt_tokens": found.prompt_tokens,
            "start_seconds": start_seconds,
            "prefill_seconds": found.prefill_seconds,
            "decode_seconds": found.decode_seconds,
            "prefill_tokens_per_second": found.prefill_speed,
            "decode_tokens_per_second": found.decode_speed,
            "seconds": time.perf_counter() - started,
        }
        print_json({**answer, **speeds, **facts})
        return
    show("\n")
    seconds = found.prefill_seconds + found.decode_seconds
    console.print(
        f"[dim]{len(found.tokens)} tokens in {seconds:.1f} s: prompt {found.prefill_speed:.1f} tokens/s, new"
        f" {found.decode_speed:.1f} tokens/s ({runtime_text(facts)})[/dim]",
        soft_wrap=True,
    )
