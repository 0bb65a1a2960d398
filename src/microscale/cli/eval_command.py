"""``microscale eval``: perplexity of a checkpoint, how far it is from the model it came from, and tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from microscale.cli.output import Column, console, print_table
from microscale.cli.parameters import result_command
from microscale.errors import counted
from microscale.jobs.evaluate_options import EvaluateOptions

if TYPE_CHECKING:
    from microscale.evaluation.tasks import TaskScore
    from microscale.jobs.evaluate import EvaluateResult, TextScores


@result_command(EvaluateOptions)
def evaluate(found: EvaluateResult, options: EvaluateOptions) -> None:
    """Score a model: on a text (perplexity, and how far it is from a reference), on tasks through lm-eval, or both.

    Example: `microscale eval OUT --text book.txt --tokens 17391 --window 1024 --reference MODEL --layers`

    Example: `microscale eval OUT --tasks lambada,piqa --task-data DIR --limit 200` (`microscale tasks` lists them)

    Example: `microscale eval OUT --text book.txt --attention mxfp4_plus --kv-cache mxfp8`
    """
    from microscale.planning.executed import linear_words

    if found.on_text is not None:
        _print_text_scores(found.on_text, found.dtype)
    for note in found.notes:
        console.print(f"note: {note}")
    if found.on_tasks is not None:
        _print_task_scores(found.on_tasks.scores, options.limit)
    if found.executed:
        console.print(f"executed: {linear_words(found.executed)}", markup=False)
    if any(found.attention.words.values()):
        console.print(f"{found.attention}: simulated, rounded and then computed with in {found.dtype}", markup=False)


def _print_text_scores(scores: TextScores, dtype: str) -> None:
    from microscale.evaluation.fidelity import FidelityResult

    score = scores.score
    console.print(
        f"perplexity {score.perplexity:.4f} over {counted(score.tokens, 'token')} in {counted(score.windows, 'window')}"
        f" of up to {scores.window} ({dtype}, {score.seconds:.1f} s)"
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


def _print_task_scores(scores: Sequence[TaskScore], limit: int | None) -> None:
    """Print the scores of whole tasks; the parts of a group are in the JSON."""
    columns = [
        Column(title="task"),
        Column(title="metric"),
        Column(title="value", is_number=True),
        Column(title="± stderr", is_number=True),
        Column(title="chance", is_number=True, drop=2),
        Column(title="documents", is_number=True, drop=1),
        Column(title="shots", is_number=True, drop=3),
    ]
    rows = [
        (
            score.task,
            score.metric + (" *" if score.is_main else ""),
            f"{score.value:.4f}",
            "" if score.stderr is None else f"{score.stderr:.4f}",
            "" if score.chance is None else f"{score.chance:.3f}",
            str(score.samples),
            str(score.num_fewshot),
        )
        for score in scores
        if score.group is None
    ]
    title = "Tasks (* the main metric" + ("" if limit is None else f"; only the first {limit} documents of each") + ")"
    print_table(title, columns, rows)
    for note in dict.fromkeys(f"{score.task}: {score.note}" for score in scores if score.note):
        console.print(note, markup=False)
