"""``microscale eval``: perplexity of a checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from microscale.cli.output import (
    JsonOption,
    SeedOption,
    command,
    console,
    print_json,
    progress_bar,
    tell_missing_kernels,
)
from microscale.errors import TextError
from microscale.evaluation import DEFAULT_BATCH, DEFAULT_WINDOW, make_windows, perplexity
from microscale.nn import cached_weights, prepare_for_inference

TextOption = Annotated[Path, typer.Option("--text", help="UTF-8 text file to score.")]
TokensOption = Annotated[
    int | None, typer.Option("--tokens", help="Use only the first N text tokens (the text must have as many).")
]
WindowOption = Annotated[int, typer.Option("--window", help="Tokens in a window, BOS included.")]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Windows in one forward call.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Float type of the computation.")]


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        TextError: it is absent, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"text {path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise TextError(f"text {path} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise TextError(f"text {path} is empty; give a text to score")
    return text


def text_windows(tokenizer: Any, text: str, *, window: int, tokens: int | None) -> list[Tensor]:
    """Tokenize a text without special tokens and cut it into windows that begin with BOS."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return make_windows(ids, window=window, num_tokens=tokens, bos=tokenizer.bos_token_id)


@command
def evaluate(
    path: Annotated[str, typer.Argument(help="Checkpoint directory (quantized or not), or hub name.")],
    text: TextOption,
    tokens: TokensOption = None,
    window: WindowOption = DEFAULT_WINDOW,
    batch: BatchOption = DEFAULT_BATCH,
    dtype: DtypeOption = "float32",
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """Score a model on a text: perplexity over windows of BOS and text tokens.

    Example: `microscale eval OUT --text book.txt --tokens 17391 --window 1024`
    """
    del seed
    from microscale.integrations.loading import check_window, load_model, load_tokenizer, logits_of, parse_dtype

    tell_missing_kernels()
    content = read_text(text)
    compute_dtype = parse_dtype(dtype)
    tokenizer = load_tokenizer(path)
    windows = text_windows(tokenizer, content, window=window, tokens=tokens)
    model = load_model(path, dtype=compute_dtype)
    check_window(model, window)
    prepare_for_inference(model)
    with progress_bar("scoring") as advance, cached_weights(model):
        result = perplexity(
            logits_of(model), windows, batch=batch, progress=lambda done, total: advance(done, total, "windows")
        )
    if as_json:
        print_json(
            {
                "model": path,
                "text": str(text),
                "perplexity": result.perplexity,
                "tokens": result.tokens,
                "windows": result.windows,
                "window": window,
                "dtype": dtype,
                "seconds": result.seconds,
            }
        )
        return
    console.print(
        f"perplexity {result.perplexity:.4f} over {result.tokens} tokens in {result.windows} window(s)"
        f" of up to {window} ({dtype}, {result.seconds:.1f} s)"
    )
    if not math.isfinite(result.perplexity):
        console.print("note: the model's losses are not finite; its weights hold NaN or Inf, or overflow")
