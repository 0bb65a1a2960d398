"""Score a model: on a text (perplexity, and how far it is from a reference), on tasks through lm-eval, or both."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microscale.calibration.texts import read_text_file
from microscale.errors import OptionError
from microscale.evaluation.fidelity import FidelityResult, fidelity
from microscale.evaluation.layer_error import LayerError, layer_errors
from microscale.evaluation.perplexity import DEFAULT_BATCH, PerplexityResult, perplexity
from microscale.evaluation.tasks import TaskScore
from microscale.formats import list_items
from microscale.formats.dtypes import dtype_name, parse_dtype
from microscale.integrations.attention import apply_attention
from microscale.integrations.lm_eval_runner import CodeExecution, TaskRequest, check_request, run_tasks
from microscale.integrations.loading import check_window, load_model, logits_of
from microscale.integrations.tokenizing import text_windows
from microscale.jobs.evaluate_options import EvaluateOptions
from microscale.jobs.given_model import label_of, tokenizer_of
from microscale.jobs.reporting import SILENT, Reporter
from microscale.jobs.shared_options import AttentionOptions
from microscale.kernels import count_executions
from microscale.layerwise.devices import chosen_device, on_device
from microscale.nn.attention_setting import NOT_ROUNDED, AttentionFormats, model_attention
from microscale.nn.inference import cached_weights
from microscale.planning.executed import Executed, by_name


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScores:
    """What a text says about a model: alone, or beside a reference."""

    reference: str | None
    text: str
    window: int
    score: PerplexityResult | FidelityResult
    layers: tuple[LayerError, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the scores beside what they were taken on."""
        said = {"reference": self.reference, "text": self.text, "window": self.window}
        found = said | dataclasses.asdict(self.score)
        if self.layers:
            found["layers"] = [dataclasses.asdict(layer) for layer in self.layers]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """What tasks say about a model; the main metric of each task comes first."""

    task_data: str | None
    scores: tuple[TaskScore, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the scores beside where their data lies."""
        return {"task_data": self.task_data, "tasks": [dataclasses.asdict(score) for score in self.scores]}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateResult:
    """The scores of a model; ``attention`` is what its attention was rounded to, ``executed`` what ran meanwhile.

    What a reference ran is counted, too.
    """

    model: str
    dtype: str
    attention: AttentionFormats
    on_text: TextScores | None
    on_tasks: TaskScores | None
    executed: Executed

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of it."""
        notes: list[str] = []
        if self.on_text is not None and not math.isfinite(self.on_text.score.perplexity):
            notes.append("the model's losses are not finite; its weights hold NaN or Inf, or overflow")
        return tuple(notes)

    def as_json(self) -> dict[str, Any]:
        """Return all scores in one object."""
        found: dict[str, Any] = {"model": self.model, "dtype": self.dtype, "attention": self.attention.words}
        for part in (self.on_text, self.on_tasks):
            found |= {} if part is None else part.as_json()
        return found | {"executed": self.executed}


def evaluate(options: EvaluateOptions, reporter: Reporter = SILENT) -> EvaluateResult:
    """Score a model on a text, on tasks, or both; a loaded model is as before afterwards, but for its memory layout.

    Raises:
        OptionError: nothing to score, or nothing to compare with.
        TextError, TaskError, FormatError, ModelError, CheckpointError: what the options name cannot be used.
        DependencyError: tasks without lm-eval.
    """
    check_options(options)
    device = chosen_device(options.device)
    AttentionFormats.parse(*options.rounding.words)
    request = None if options.tasks is None else task_request(options)
    content = None if options.text is None else read_text_file(options.text)
    dtype = parse_dtype(options.dtype)
    tokenizer = tokenizer_of(options.model, options.tokenizer)
    windows = [] if content is None else text_windows(tokenizer, content, window=options.window, tokens=options.tokens)
    model = _opened(options.model, dtype)
    on_text = on_tasks = None
    with (
        on_device(model, device),
        _attention_as_asked(model, options.rounding) as attention,
        count_executions() as counts,
    ):
        if options.text is not None:
            check_window(model, options.window)
            reference = None if options.reference is None else _opened(options.reference, dtype)
            with contextlib.nullcontext() if reference is None else on_device(reference, device):
                on_text = _score_text(model, reference, windows, options, reporter)
        if request is not None:
            on_tasks = _score_tasks(model, tokenizer, request, reporter)
    return EvaluateResult(
        model=label_of(options.model),
        dtype=options.dtype if isinstance(options.model, str | Path) else dtype_name(model.dtype),
        attention=attention,
        on_text=on_text,
        on_tasks=on_tasks,
        executed=by_name(counts),
    )


def check_options(options: EvaluateOptions) -> None:
    """Refuse options that leave nothing to score, or nothing to compare with.

    Raises:
        OptionError: they do.
    """
    if options.text is None and options.tasks is None:
        raise OptionError("nothing to score: give --text FILE, --tasks NAMES or both")
    if options.layers and options.reference is None:
        raise OptionError("--layers compares with a reference; give --reference MODEL")
    if options.task_data is not None and options.tasks is None:
        raise OptionError("--task-data is where the data of tasks lies; give --tasks NAMES")
    if options.reference is not None and options.text is None:
        raise OptionError("--reference compares on a text; give --text FILE")


def _opened(model: Any, dtype: torch.dtype) -> Any:
    return load_model(model, dtype=dtype) if isinstance(model, str | Path) else model


def task_request(options: EvaluateOptions) -> TaskRequest:
    """Return what is asked of lm-eval, checked before a model is loaded.

    Raises:
        TaskError: an unknown task, one that needs a permission, or one whose local data is absent.
    """
    names = options.tasks or ()
    request = TaskRequest(
        tasks=tuple(list_items(names) if isinstance(names, str) else names),
        task_data=options.task_data,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        seed=options.seed,
        code_execution=CodeExecution.ALLOWED if options.allow_code_execution else CodeExecution.FORBIDDEN,
        **({} if options.batch is None else {"batch": options.batch}),
    )
    check_request(request)
    return request


@contextlib.contextmanager
def _attention_as_asked(model: Any, asked: AttentionOptions) -> Generator[AttentionFormats, None, None]:
    """Round the attention of a model inside the block as options say, else as its checkpoint does."""
    stored = model_attention(model) or NOT_ROUNDED
    wanted = AttentionFormats.parse(*asked.words, stored)
    if wanted == stored:
        yield wanted
        return
    apply_attention(model, wanted)
    try:
        yield wanted
    finally:
        apply_attention(model, stored)


def _score_text(
    model: Any, reference: Any, windows: list[Tensor], options: EvaluateOptions, reporter: Reporter
) -> TextScores:
    """Score a loaded model on windows, beside a loaded reference unless that is None."""
    batch = options.batch or DEFAULT_BATCH
    layers: list[LayerError] = []
    with contextlib.ExitStack() as stack:
        for loaded in (model, reference):
            if loaded is not None:
                stack.enter_context(cached_weights(loaded))
        advance = stack.enter_context(reporter.stage("scoring"))

        def telling(label: str) -> Callable[[int, int], None]:
            return lambda done, total: advance(done, total, label)

        if reference is None:
            score = perplexity(logits_of(model), windows, batch=batch, progress=telling("windows"))
        else:
            pair = logits_of(model), logits_of(reference)
            score = fidelity(*pair, windows, batch=batch, progress=telling("windows, both models"))
        if reference is not None and options.layers:
            tell = telling("windows, layer by layer")
            layers = layer_errors(model, reference, windows, logits_of, batch=batch, progress=tell)
    return TextScores(
        reference=None if options.reference is None else label_of(options.reference),
        text=str(options.text),
        window=options.window,
        score=score,
        layers=tuple(layers),
    )


def _score_tasks(model: Any, tokenizer: Any, request: TaskRequest, reporter: Reporter) -> TaskScores:
    """Run tasks on a loaded model whose packed weights run on the kernels."""
    with reporter.stage("tasks") as advance, cached_weights(model):
        scores = run_tasks(model, tokenizer, request, lambda done, total: advance(done, total, "requests"))
    folder = None if request.task_data is None else str(request.task_data)
    return TaskScores(task_data=folder, scores=tuple(scores))
