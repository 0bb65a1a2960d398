"""``microscale eval``: perplexity of a checkpoint, and how far it is from the model it came from."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from microscale.calibration import read_text_file
from microscale.cli.output import (
    Column,
    JsonOption,
    SeedOption,
    command,
    console,
    print_json,
    print_table,
    progress_bar,
    tell_missing_kernels,
)
from microscale.cli.task_scores import (
    CodeOption,
    FewshotOption,
    LimitOption,
    TaskDataOption,
    TasksOption,
    make_request,
    print_task_scores,
    score_tasks,
    task_scores_json,
)
from microscale.evaluation import (
    DEFAULT_BATCH,
    DEFAULT_WINDOW,
    FidelityResult,
    LayerError,
    PerplexityResult,
    fidelity,
    layer_errors,
    make_windows,
    perplexity,
)
from microscale.nn import AttentionFormats, cached_weights, model_attention, parse_attention, prepare_for_inference

TextOption = Annotated[Path, typer.Option("--text", help="UTF-8 text file to score.")]
TokensOption = Annotated[
    int | None, typer.Option("--tokens", help="Use only the first N text tokens (the text must have as many).")
]
WindowOption = Annotated[int, typer.Option("--window", help="Tokens in a window, BOS included.")]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Windows in one forward call.")]
ReferenceOption = Annotated[
    str | None,
    typer.Option("--reference", help="Also score this model (the original): KL divergence, top-1 agreement."),
]
LayersOption = Annotated[
    bool, typer.Option("--layers", help="With --reference: also the error of every decoder layer's output.")
]
AttentionOption = Annotated[
    str | None,
    typer.Option(
        "--attention",
        help="Round what enters the products of attention to this format, simulated in floats"
        " (none: leave it; default: as the checkpoint says).",
    ),
]
KvCacheOption = Annotated[
    str | None,
    typer.Option("--kv-cache", help="Round keys and values as they are stored, likewise."),
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="Float type of the computation.")]


def text_windows(tokenizer: Any, text: str, *, window: int, tokens: int | None) -> list[Tensor]:
    """Tokenize a text without special tokens and cut it into windows that begin with BOS."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return make_windows(ids, window=window, num_tokens=tokens, bos=tokenizer.bos_token_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScores:
    """What a text says about a model: alone, or beside a reference."""

    score: PerplexityResult | FidelityResult
    layers: tuple[LayerError, ...] = ()


@command
def evaluate(
    path: Annotated[str, typer.Argument(help="Checkpoint directory (quantized or not), or hub name.")],
    text: Annotated[Path | None, typer.Option("--text", help="UTF-8 text file to score.")] = None,
    tokens: TokensOption = None,
    window: WindowOption = DEFAULT_WINDOW,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Windows (4) or task requests (16) in one forward call.")
    ] = None,
    dtype: DtypeOption = "float32",
    attention: AttentionOption = None,
    kv_cache: KvCacheOption = None,
    reference: ReferenceOption = None,
    layers: LayersOption = False,
    tasks: TasksOption = None,
    task_data: TaskDataOption = None,
    limit: LimitOption = None,
    num_fewshot: FewshotOption = None,
    allow_code_execution: CodeOption = False,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """Score a model: on a text (perplexity, and how far it is from a reference), on tasks through lm-eval, or both.

    Example: `microscale eval OUT --text book.txt --tokens 17391 --window 1024 --reference MODEL --layers`

    Example: `microscale eval OUT --tasks lambada,piqa --task-data DIR --limit 200` (`microscale tasks` lists them)

    Example: `microscale eval OUT --text book.txt --attention mxfp4_plus --kv-cache mxfp8`
    """
    from microscale.integrations.loading import check_window, load_model, load_tokenizer, parse_dtype

    _check_options(text=text, tasks=tasks, reference=reference, layers=layers)
    for word in (attention, kv_cache):
        parse_attention(word)
    tell_missing_kernels()
    request = None
    if tasks is not None:
        request = make_request(
            tasks,
            task_data=task_data,
            limit=limit,
            num_fewshot=num_fewshot,
            batch=batch,
            seed=seed,
            allow_code_execution=allow_code_execution,
        )
    content = None if text is None else read_text_file(text)
    compute_dtype = parse_dtype(dtype)
    tokenizer = load_tokenizer(path)
    windows = [] if content is None else text_windows(tokenizer, content, window=window, tokens=tokens)
    model = load_model(path, dtype=compute_dtype)
    executed = round_as_asked(model, attention, kv_cache)
    facts: dict[str, Any] = {"model": path, "dtype": dtype, "attention": executed.words}
    if text is not None:
        check_window(model, window)
        original = None if reference is None else load_model(reference, dtype=compute_dtype)
        scores = score_text(model, original, windows, batch=batch or DEFAULT_BATCH, with_layers=layers)
        facts |= {"reference": reference, "text": str(text), "window": window} | text_scores_json(scores)
        if not as_json:
            print_text_scores(scores, window=window, dtype=dtype)
    if request is not None:
        found = score_tasks(model, tokenizer, request)
        facts |= {"task_data": None if task_data is None else str(task_data), "tasks": task_scores_json(found)}
        if not as_json:
            print_task_scores(found, limit=limit)
    if as_json:
        print_json(facts)
    elif executed != AttentionFormats():
        console.print(f"{executed}: simulated, rounded and then computed with in {dtype}", markup=False)


def round_as_asked(model: Any, attention: str | None, kv_cache: str | None) -> AttentionFormats:
    """Round the attention of a loaded model as options say, else as its checkpoint does; returns what is executed."""
    from microscale.integrations.attention import apply_attention

    stored = model_attention(model) or AttentionFormats()
    wanted = AttentionFormats(
        products=stored.products if attention is None else parse_attention(attention),
        kv_cache=stored.kv_cache if kv_cache is None else parse_attention(kv_cache),
    )
    if wanted != stored:
        apply_attention(model, wanted)
    return wanted


def _check_options(*, text: Path | None, tasks: str | None, reference: str | None, layers: bool) -> None:
    """Refuse options that leave nothing to score, or nothing to compare with.

    Raises:
        typer.BadParameter: they do.
    """
    if text is None and tasks is None:
        raise typer.BadParameter("nothing to score: give --text FILE, --tasks NAMES or both")
    if layers and reference is None:
        raise typer.BadParameter("--layers compares with a reference; give --reference MODEL")
    if reference is not None and text is None:
        raise typer.BadParameter("--reference compares on a text; give --text FILE")


def score_text(model: Any, reference: Any, windows: list[Tensor], *, batch: int, with_layers: bool) -> TextScores:
    """Score a loaded model on windows, beside a loaded reference unless that is None."""
    from microscale.integrations.loading import logits_of

    for loaded in (model, reference):
        if loaded is not None:
            prepare_for_inference(loaded)
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress_bar("scoring"))
        stack.enter_context(cached_weights(model))
        if reference is None:
            score = perplexity(
                logits_of(model), windows, batch=batch, progress=lambda done, total: advance(done, total, "windows")
            )
            return TextScores(score=score)
        stack.enter_context(cached_weights(reference))
        score = fidelity(
            logits_of(model),
            logits_of(reference),
            windows,
            batch=batch,
            progress=lambda done, total: advance(done, total, "windows, both models"),
        )
        if not with_layers:
            return TextScores(score=score)
        errors = layer_errors(
            model,
            reference,
            windows,
            logits_of,
            batch=batch,
            progress=lambda done, total: advance(done, total, "windows, layer by layer"),
        )
        return TextScores(score=score, layers=tuple(errors))


def text_scores_json(scores: TextScores) -> dict[str, Any]:
    """Return scores as JSON values."""
    found = dataclasses.asdict(scores.score)
    if scores.layers:
        found["layers"] = [dataclasses.asdict(layer) for layer in scores.layers]
    return found


def print_text_scores(scores: TextScores, *, window: int, dtype: str) -> None:
    """Print scores for people."""
    score = scores.score
    console.print(
        f"perplexity {score.perplexity:.4f} over {score.tokens} tokens in {score.windows} window(s)"
        f" of up to {window} ({dtype}, {score.seconds:.1f} s)"
    )
    if isinstance(score, FidelityResult):
        console.print(
            f"reference  {score.reference_perplexity:.4f}   KL divergence {score.kl_mean:.5f} nats on average,"
            f" {score.kl_p99:.4f} at the 99th percentile; top-1 agreement {100 * score.agreement:.2f} %"
        )
    if scores.layers:
        columns = [
            Column(title="layer"),
            *(Column(title=title, is_number=True) for title in ("error", "SQNR dB", "token error")),
        ]
        rows = [
            (layer.name, f"{layer.relative_error:.3e}", f"{layer.sqnr_db:.2f}", f"{layer.token_error:.3e}")
            for layer in scores.layers
        ]
        print_table("Error of each decoder layer's output, on the model's own inputs", columns, rows)
    if not math.isfinite(score.perplexity):
        console.print("note: the model's losses are not finite; its weights hold NaN or Inf, or overflow")
