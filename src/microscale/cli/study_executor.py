"""How ``microscale study`` makes and scores models: the Python front door, perplexity and lm-eval tasks."""

from __future__ import annotations

import contextlib
import inspect
import platform
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from microscale.calibration import read_text_file
from microscale.cli.eval_command import text_windows
from microscale.errors import QuantizationNote, TextError
from microscale.evaluation import perplexity
from microscale.nn import PackedModule, cached_weights, prepare_for_inference
from microscale.studies import PreparedModel, Study, StudyRun, StudyScore, StudyTask


class QuantizeAndScore:
    """The executor of real studies: models are loaded from disk for each run, so that no run changes another's."""

    def __init__(self, study: Study, *, device: str = "cpu", quantize: Callable[..., Any] | None = None) -> None:
        """Take a study; ``quantize`` is :func:`microscale.quantize` unless a test gives another."""
        from microscale import quantize as front_door

        self._study, self._device, self._quantize = study, device, quantize or front_door

    @property
    def machine(self) -> str:
        """The GPU's name, or the processor's with the number of threads."""
        if self._device != "cpu":
            return torch.cuda.get_device_name(self._device)
        return f"{_processor()}, {torch.get_num_threads()} threads"

    def prepare(self, run: StudyRun) -> PreparedModel:
        """Load a model and quantize it as the run says; the computation is float32."""
        from microscale.integrations.loading import load_original, load_tokenizer, stored_dtype

        path = self._study.place(run.model.path)
        model = load_original(path, dtype=torch.float32).to(self._device)
        notes: list[str] = []
        if run.weights is not None and run.method is not None:
            options = self._options(run, load_tokenizer(path))
            with _noted(notes):
                model = self._quantize(
                    model, run.weights, activations=run.activations, method=run.method.method, **options
                )
        prepared = _measured(model, stored_dtype(path).itemsize, notes)  # before a layout pads anything
        prepare_for_inference(model)
        return prepared

    def _options(self, run: StudyRun, tokenizer: Any) -> dict[str, Any]:
        """Return the other keywords, as far as the front door has them."""
        study = self._study
        wanted: dict[str, Any] = {"seed": study.seed, "tokenizer": tokenizer}
        wanted |= {"attention": run.attention, "kv_cache": run.kv_cache}
        wanted["effort"] = study.effort if run.method is None else run.method.effort or study.effort
        if study.calibration is not None:
            wanted["calibration"] = study.place(study.calibration.text)
            wanted |= {"samples": study.calibration.samples, "window": study.calibration.window}
        known = inspect.signature(self._quantize).parameters
        takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
        return {name: value for name, value in wanted.items() if takes_all or name in known}

    def score(self, prepared: PreparedModel, run: StudyRun, task: StudyTask) -> Sequence[StudyScore]:
        """Score a model on a text or on a task of lm-eval."""
        from microscale.integrations.loading import load_tokenizer

        tokenizer = load_tokenizer(self._study.place(run.model.path))
        with cached_weights(prepared.model):
            if task.text is not None:
                return [self._perplexity(prepared.model, tokenizer, task)]
            return self._task(prepared.model, tokenizer, task)

    def _perplexity(self, model: Any, tokenizer: Any, task: StudyTask) -> StudyScore:
        from microscale.integrations.loading import check_window, logits_of

        check_window(model, task.window)
        text = read_text_file(Path(self._study.place(task.text or "")))
        windows = text_windows(tokenizer, text, window=task.window, tokens=task.tokens)
        found = perplexity(logits_of(model), windows, batch=self._study.batch)
        return _score("perplexity", found.perplexity, None, found.tokens, is_main=True, is_higher_better=False)

    def _task(self, model: Any, tokenizer: Any, task: StudyTask) -> list[StudyScore]:
        from microscale.integrations.lm_eval_runner import TaskRequest, run_tasks

        folder = None if self._study.task_data is None else Path(self._study.place(self._study.task_data))
        request = TaskRequest(
            tasks=(task.task or "",),
            task_data=folder,
            limit=task.limit,
            num_fewshot=task.num_fewshot,
            seed=self._study.seed,
        )
        return [
            _score(
                one.metric,
                one.value,
                one.stderr,
                one.samples,
                is_main=one.is_main,
                is_higher_better=one.is_higher_better,
            )
            for one in run_tasks(model, tokenizer, request)
            if one.group is None
        ]


def _score(
    metric: str, value: float, stderr: float | None, samples: int, *, is_main: bool, is_higher_better: bool
) -> StudyScore:
    return StudyScore(
        task_key="",
        metric=metric,
        value=value,
        stderr=stderr,
        samples=samples,
        is_main=is_main,
        is_higher_better=is_higher_better,
        seconds=0.0,
    )


@contextlib.contextmanager
def _noted(notes: list[str]) -> Generator[None, None, None]:
    """Collect what is said of a job inside the block, in place of warnings; other warnings go on."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", QuantizationNote)
        yield
    for one in found:
        if isinstance(one.message, QuantizationNote):
            notes.append(str(one.message))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _measured(model: Any, width: int, notes: Sequence[str]) -> PreparedModel:
    """Return a model with its bits per quantized weight (all bits of the stored type where none is) and its size."""
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    packed_bytes = sum(module.num_bytes for module in packed)
    weights = sum(module.tensor.shape[0] * module.tensor.shape[1] for module in packed)
    others = sum(parameter.numel() for parameter in model.parameters())
    return PreparedModel(
        model=model,
        bits_per_weight=8 * packed_bytes / weights if weights else 8.0 * width,
        num_bytes=packed_bytes + others * width,
        notes=tuple(notes),
    )


def _processor() -> str:
    """Return the processor's name where Linux tells it, else its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def check_texts(study: Study) -> None:
    """Refuse a study whose texts do not exist, before hours of work.

    Raises:
        TextError: with the path.
    """
    texts = [task.text for task in study.tasks if task.text is not None]
    texts += [] if study.calibration is None else [study.calibration.text]
    for text in texts:
        if not Path(study.place(text)).is_file():
            raise TextError(f"text {study.folder / text} does not exist; paths begin at the study file")
