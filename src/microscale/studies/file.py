"""The file of a study: models × formats × methods × tasks, as data.

::

    models: [models/llama, {name: qwen, path: models/qwen}]
    formats: [mxfp8, mxfp4, {name: mxfp4 weights, weights: mxfp4, activations: none}, {weights: mxfp4, kv_cache: mxfp8}]
    activations: same           # of formats that are one word: same as the weights, none, or a format
    methods: [rtn, mr-gptq, {name: smooth, method: "smoothquant+rtn", formats: [mxfp4]}]
    calibration: {text: texts/calibration.txt, samples: 128, window: 1024}
    effort: fast
    seed: 0
    tasks:
      - {name: books, text: texts/books.txt, tokens: 17391, window: 1024}    # perplexity of a text
      - {task: piqa, limit: 500}                                             # lm-eval
    task_data: tasks            # folder of local task files
    batch: 4

Paths are relative to the file. The unquantized model is always scored too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar

import yaml
from pydantic import Field, ValidationError, model_validator

from microscale.errors import FormatError, RecipeError, StudyError, check_path
from microscale.formats import NONE, ActivationSpec, Format, Written, WrittenInputs, parse_format, parse_inputs
from microscale.recipes.fields import (
    AS_WRITTEN,
    RTN,
    AttentionFields,
    MethodField,
    Record,
    first_error,
    problem_text,
    read_by,
    unknown_key,
)
from microscale.recipes.recipe import key_problems, line_of


class Same(Enum):
    """Inputs that are rounded to the format of the weights."""

    SAME = "same"


def _parse_weights(given: Any) -> Written[Format]:
    return given if isinstance(given, Written) else Written(given, parse_format(given))


def _parse_inputs(given: Any) -> Written[ActivationSpec | Same | None]:
    return Written(given, Same.SAME) if given == Same.SAME.value else parse_inputs(given)


StudyWeightsField = Annotated[Written[Format], read_by(_parse_weights), AS_WRITTEN]
StudyInputsField = Annotated[Written[ActivationSpec | Same | None], read_by(_parse_inputs), AS_WRITTEN]

FOLDER = "folder"
"""The one field that comes from where the file lies, not from what it says."""


class _Record(Record):
    refusal = StudyError
    needed = "a study needs models, formats and tasks"
    main: ClassVar[str | None] = None
    """The field that a record written as one word has alone."""

    @model_validator(mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        return {cls.main: value} if cls.main is not None and isinstance(value, str) else value


class StudyModel(_Record):
    """A model: directory or hub name, and a short name."""

    main = "path"
    path: str
    name: str = ""

    @property
    def label(self) -> str:
        """The name, or the last part of the path."""
        return self.name or Path(self.path).name


class StudyFormat(AttentionFields, _Record):
    """Formats of weights, activations, the products of attention and the KV cache, under one name."""

    main = "weights"
    weights: StudyWeightsField
    activations: StudyInputsField | None = None
    name: str = ""

    @property
    def attention_words(self) -> tuple[str, ...]:
        """What is said of attention, as parts of a label and of a key; nothing where it stays as it is."""
        return tuple(f"{title} {given}" for title, given in self.rounding.items() if given.record is not None)


class StudyMethod(_Record):
    """A method under a name; with ``formats`` it is used for those only, with ``effort`` that one."""

    main = "method"
    method: MethodField
    name: str = ""
    effort: str | None = None
    formats: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name, or the method itself."""
        return self.name or str(self.method)


class StudyCalibration(_Record):
    """What methods that need it are calibrated on."""

    text: str
    samples: int = Field(default=128, ge=1)
    window: int = Field(default=1024, ge=2)


class StudyTask(_Record):
    """A text whose perplexity is taken, or a task of lm-eval."""

    text: str | None = None
    tokens: int | None = Field(default=None, ge=1)
    window: int = Field(default=1024, ge=2)
    task: str | None = None
    limit: int | None = Field(default=None, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    name: str = ""

    @model_validator(mode="after")
    def _one_of_two(self) -> StudyTask:
        if (self.text is None) == (self.task is None):
            raise ValueError("a task has either 'text' (perplexity of a file) or 'task' (a name of `microscale tasks`)")
        return self

    @property
    def label(self) -> str:
        """The name, or the task, or the name of the text without its ending."""
        return self.name or self.task or Path(self.text or "").stem

    @property
    def key(self) -> str:
        """What the score depends on; scores of another key are not taken for this task's."""
        if self.text is not None:
            return f"perplexity({Path(self.text).name},tokens={self.tokens},window={self.window})"
        return f"{self.task}(limit={self.limit},shots={self.num_fewshot})"


class Study(_Record):
    """A whole study; ``folder`` is where its paths begin."""

    models: tuple[StudyModel, ...]
    formats: tuple[StudyFormat, ...]
    methods: tuple[StudyMethod, ...] = (StudyMethod(method=RTN),)
    tasks: tuple[StudyTask, ...]
    activations: StudyInputsField = Written(Same.SAME.value, Same.SAME)
    calibration: StudyCalibration | None = None
    effort: str = "fast"
    seed: int = 0
    task_data: str | None = None
    batch: int = Field(default=4, ge=1)
    name: str = ""
    folder: Path = Path()

    @model_validator(mode="after")
    def _nothing_is_empty_or_double(self) -> Study:
        for title, labels in (
            ("models", [model.label for model in self.models]),
            ("formats", [self.format_label(format) for format in self.formats]),
            ("methods", [method.label for method in self.methods]),
            ("tasks", [task.label for task in self.tasks]),
        ):
            if not labels:
                raise ValueError(f"{title}: at least one is needed")
            double = next((label for label in labels if labels.count(label) > 1), None)
            if double is not None:
                raise ValueError(f"{title}: {double!r} stands there twice; give one of them another name")
        known = {self.format_label(format) for format in self.formats}
        for method in self.methods:
            for wanted in method.formats:
                if wanted not in known:
                    raise ValueError(f"methods: {method.label!r} names format {wanted!r}, which is none of {known}")
        return self

    @classmethod
    def known_keys(cls, location: Sequence[int | str]) -> list[str]:
        """Return the keys that are known where a key of a file stands."""
        records: dict[int | str, type[Record]] = {
            "models": StudyModel,
            "formats": StudyFormat,
            "methods": StudyMethod,
            "tasks": StudyTask,
            "calibration": StudyCalibration,
        }
        record = cls if len(location) < 2 else records.get(location[0], cls)
        return [name for name in record.model_fields if name != FOLDER]

    def activations_of(self, format: StudyFormat) -> WrittenInputs | None:
        """Return the setting of the inputs that goes with a format, None for none."""
        asked = format.activations or self.activations
        spec = ActivationSpec(format=format.weights.record) if asked.record is Same.SAME else asked.record
        return None if spec is None else Written(str(format.weights if asked.record is Same.SAME else asked), spec)

    def format_label(self, format: StudyFormat) -> str:
        """Return the name of a format: its own, or WEIGHTS where the activations are the same, else both.

        What is said of attention follows.
        """
        if format.name:
            return format.name
        weights, activations = str(format.weights), str(self.activations_of(format) or NONE)
        both = weights if activations == weights else f"{weights} / {activations}"
        return ", ".join((both, *format.attention_words))

    def settings_hash(self, method: StudyMethod) -> str:
        """Return eight digits for all that shapes a quantized model beside its format and method."""
        facts: dict[str, Any] = {
            "seed": self.seed,
            "effort": method.effort or self.effort,
            "method": str(method.method),
        }
        if self.calibration is not None:
            calibration = self.calibration.model_dump()
            facts |= calibration | {"text": Path(self.calibration.text).name}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]

    def place(self, path: str) -> str:
        """Return a path of the file as seen from here; what is no path below the file's folder stays (a hub name)."""
        placed = self.folder / path
        return str(placed) if placed.exists() else path


def load_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        StudyError: the file is absent, not YAML, or not a study; the message names the line.
    """
    check_path(path, "the path of a study", "a text or a Path", error=StudyError)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"study {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise StudyError(f"study {path} is not valid YAML: {error}") from None
    for line, problem in key_problems(node):
        raise StudyError(f"study {path}, line {line}: {problem}")
    if not isinstance(content, dict):
        raise StudyError(f"study {path}, line 1: a study is a mapping with models, formats and tasks")
    if FOLDER in content:
        line = line_of(node, [FOLDER])
        raise StudyError(f"study {path}, line {line}: {unknown_key([FOLDER], Study.known_keys([FOLDER]))}")
    try:
        study = Study.read(content)
    except ValidationError as error:
        location = first_error(error)["loc"]
        problem = problem_text(error, Study)
        raise StudyError(f"study {path}, line {line_of(node, location)}: {problem}") from None
    except (FormatError, RecipeError) as error:
        raise StudyError(f"study {path}: {error}") from None
    return study.model_copy(update={"folder": path.parent})
