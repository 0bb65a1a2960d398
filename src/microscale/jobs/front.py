"""The Python front of a job: keywords in, the record of the result out.

``microscale.generate("OUT", "The sea was", max_new_tokens=40)`` is the job ``generate`` with the options of
:class:`~microscale.jobs.small_options.GenerateOptions`, under the same words as on the command line.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, Protocol, TypeVar, cast, get_type_hints, runtime_checkable

from microscale.errors import OptionError, QuantizationNote, shown
from microscale.integrations.remote_code import trusting
from microscale.jobs.option import Options, Place, options_of, record_from
from microscale.jobs.reporting import Progress, ProgressReporter, Reporter

O = TypeVar("O", bound=Options)  # noqa: E741
R = TypeVar("R")


@runtime_checkable
class HasNotes(Protocol):
    """A result that has something to say; Python warns of it, the command line prints it."""

    @property
    def notes(self) -> Sequence[str]:
        """The texts."""
        ...


def front(job: Callable[[O, Reporter], R]) -> Callable[..., R]:
    """Return a job as a function of keywords; ``progress`` is called with (done, total, what is at hand).

    ``progress`` may be a :class:`~microscale.jobs.reporting.Reporter` instead, which hears stages and notes too, such
    as what a job will take.

    The record of options is the one that the job's annotation names. Notes of the result become warnings of
    :class:`~microscale.errors.QuantizationNote`.

    Raises:
        OptionError: the function that is returned: an unknown word, or a value that its option refuses.
    """
    record = record_of(job)
    placed = [one.word for one in options_of(record) if one.option.place is Place.ARGUMENT]

    @functools.wraps(job)
    def call(*arguments: Any, **words: Any) -> R:
        if len(arguments) > len(placed):
            raise OptionError(f"{job.__name__} takes {', '.join(placed)} without a word, all else by its word")
        return run_job(job, dict(zip(placed, arguments, strict=False)) | words, depth=2)

    call.__signature__ = signature_of(record)  # type: ignore[attr-defined]
    call.__doc__ = f"{inspect.getdoc(job)}\n\n{_options_text(record)}"
    return call


def record_of(job: Callable[[O, Reporter], R]) -> type[O]:
    """Return the record of options that a job takes."""
    return get_type_hints(job)["options"]


def run_job(job: Callable[[O, Reporter], R], words: Mapping[str, Any], *, depth: int) -> R:
    """Run a job on words; its notes become warnings at the line that many calls below.

    Raises:
        OptionError: an unknown word, or a value that its option refuses.
    """
    given = dict(words)
    progress = given.pop("progress", None)
    reporter = _reporter(progress)
    options = record_from(record_of(job), given)
    with trusting(getattr(options, "trust_remote_code", False)):
        result = job(options, reporter)
    if isinstance(result, HasNotes):
        for note in result.notes:
            warnings.warn(note, QuantizationNote, stacklevel=depth + 1)
    return result


def _reporter(progress: Any) -> Reporter:
    """Return what hands progress to a function of the user or to nobody, or the user's own reporter."""
    if progress is None:
        return ProgressReporter()
    if all(callable(getattr(progress, name, None)) for name in ("stage", "note")):
        return cast(Reporter, progress)
    if not callable(progress):
        raise OptionError(f"progress is a function, called with (done, total, what is at hand), got {shown(progress)}")
    return ProgressReporter(cast(Progress, progress))


def signature_of(record: type[Options], *, positional: Sequence[str] = ()) -> inspect.Signature:
    """Return the signature of a function that takes the options of a record by word, some also without."""
    placed = [one.word for one in options_of(record) if one.option.place is Place.ARGUMENT] + list(positional)
    parameters = [
        inspect.Parameter(
            one.word,
            inspect.Parameter.POSITIONAL_OR_KEYWORD if one.word in placed else inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if one.default is MISSING else one.default,
            annotation=one.type,
        )
        for one in sorted(options_of(record), key=lambda one: one.word not in placed)
    ]
    return inspect.Signature([*parameters, inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=None)])


def _options_text(record: type[Options]) -> str:
    return "Options:\n" + "\n".join(f"    {one.word}: {one.option.help}" for one in options_of(record))
