"""How ``study`` makes and scores models: quantized as ``quantize`` does, scored by perplexity and lm-eval tasks."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from microscale.calibration.texts import read_text_file
from microscale.evaluation.perplexity import perplexity
from microscale.integrations.lm_eval_runner import TaskRequest, run_tasks
from microscale.integrations.loading import check_window, load_original, load_tokenizer, logits_of, stored_dtype
from microscale.integrations.tokenizing import text_windows
from microscale.jobs.quantize import quantize
from microscale.jobs.quantize_options import QuantizeOptions, RecipeOptions
from microscale.jobs.shared_options import AttentionOptions, CalibrationOptions
from microscale.layerwise.devices import moved
from microscale.nn.inference import cached_weights, prepare_for_inference
from microscale.nn.sizes import file_size, packed_size
from microscale.studies.file import Study, StudyMethod, StudyTask
from microscale.studies.run import PreparedModel, StudyRun
from microscale.studies.store import StudyScore


class QuantizeAndScore:
    """The executor of real studies: models are loaded from disk for each run, so that no run changes another's."""

    def __init__(self, study: Study, *, device: torch.device | None = None) -> None:
        self._study, self._device = study, device or torch.device("cpu")

    @property
    def machine(self) -> str:
        """The GPU's name, or the processor's with the number of threads."""
        if self._device.type != "cpu":
            return torch.cuda.get_device_name(self._device)
        return f"{_processor()}, {torch.get_num_threads()} threads"

    def prepare(self, run: StudyRun) -> PreparedModel:
        """Load a model and quantize it as the run says; the computation is float32."""
        path = self._study.place(run.model.path)
        model = moved(load_original(path, dtype=torch.float32), self._device)
        notes: tuple[str, ...] = ()
        if run.weights is not None and run.method is not None:
            words = self.recipe(run, run.method)
            options = QuantizeOptions(
                model=model, recipe=words, calibration=self.calibration(), tokenizer=load_tokenizer(path)
            )
            done = quantize(options)
            model, notes = done.model, done.notes
        prepared = _measured(model, stored_dtype(path), notes)  # before a layout pads anything
        prepare_for_inference(model)
        return prepared

    def recipe(self, run: StudyRun, method: StudyMethod) -> RecipeOptions:
        """Return the words of a run's recipe: without a layout, so that formats are executed exactly as asked."""
        return RecipeOptions(
            format=run.weights,
            activations=run.activations,
            rounding=AttentionOptions(**dict(run.rounding)),
            method=method.method,
            effort=(method.effort or self._study.effort) if method.method.takes_effort else None,
        )

    def calibration(self) -> CalibrationOptions:
        """Return what the methods of the study learn from."""
        study = self._study
        if study.calibration is None:
            return CalibrationOptions(seed=study.seed)
        return CalibrationOptions(
            source=study.place(study.calibration.text),
            samples=study.calibration.samples,
            window=study.calibration.window,
            seed=study.seed,
        )

    def score(self, prepared: PreparedModel, run: StudyRun, task: StudyTask) -> Sequence[StudyScore]:
        """Score a model on a text or on a task of lm-eval."""
        tokenizer = load_tokenizer(self._study.place(run.model.path))
        with cached_weights(prepared.model):
            if task.text is not None:
                return [self._perplexity(prepared.model, tokenizer, task)]
            return self._task(prepared.model, tokenizer, task)

    def _perplexity(self, model: Any, tokenizer: Any, task: StudyTask) -> StudyScore:
        check_window(model, task.window)
        text = read_text_file(Path(self._study.place(task.text or "")))
        windows = text_windows(tokenizer, text, window=task.window, tokens=task.tokens)
        found = perplexity(logits_of(model), windows, batch=self._study.batch)
        return StudyScore(metric="perplexity", value=found.perplexity, samples=found.tokens, is_higher_better=False)

    def _task(self, model: Any, tokenizer: Any, task: StudyTask) -> list[StudyScore]:
        folder = None if self._study.task_data is None else Path(self._study.place(self._study.task_data))
        request = TaskRequest(
            tasks=(task.task or "",),
            task_data=folder,
            limit=task.limit,
            num_fewshot=task.num_fewshot,
            seed=self._study.seed,
        )
        return [
            StudyScore(
                metric=one.metric,
                value=one.value,
                stderr=one.stderr,
                samples=one.samples,
                is_main=one.is_main,
                is_higher_better=one.is_higher_better,
            )
            for one in run_tasks(model, tokenizer, request)
            if one.group is None
        ]


def _measured(model: Any, dtype: torch.dtype, notes: Sequence[str]) -> PreparedModel:
    """Return a model with its bits per quantized weight (all bits of the stored type where none is) and its size."""
    packed = packed_size(model.modules())
    return PreparedModel(
        model=model,
        bits_per_weight=packed.bits_per_weight if packed.num_weights else 8.0 * dtype.itemsize,
        num_bytes=file_size(model, packed, dtype).num_bytes,
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
