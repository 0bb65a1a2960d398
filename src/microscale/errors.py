"""Every exception that microscale raises: one class per cause, with the values and the remedy in the text.

Each message says what was expected, what came, and what to do. All classes derive from
:class:`MicroscaleError`; those with a close builtin relative derive from it too, so that
``except ValueError`` works as a Python programmer expects.
"""

from __future__ import annotations

import difflib
import os
from collections import abc
from typing import cast


class MicroscaleError(Exception):
    """Root of all errors that microscale raises on purpose."""


class FormatError(MicroscaleError, ValueError):
    """A format record whose parts contradict each other or leave what a format can express."""


class FormatSpecError(FormatError):
    """A format specification that cannot be parsed; the message points at the word and lists what is possible."""

    def __init__(self, spec: str, position: int, problem: str, remedy: str) -> None:
        self.spec = spec
        self.position = position
        pointer = " " * position + "^"
        super().__init__(f"format {spec!r}: {problem}\n  {spec}\n  {pointer}\n{remedy}")


class NonFiniteError(MicroscaleError, ValueError):
    """NaN or Inf where the format's policy says to raise."""


class ShapeError(MicroscaleError, ValueError):
    """A tensor whose shape does not fit the operation or the file."""


class RowError(MicroscaleError, IndexError):
    """A row that a tensor does not have."""


class DtypeError(MicroscaleError, TypeError):
    """A tensor whose dtype does not fit the operation or the file."""


class KernelError(MicroscaleError, RuntimeError):
    """No backend can run an operation; the message lists every backend with its reason."""


class DeviceError(MicroscaleError, RuntimeError):
    """A device that is not here, or whose memory does not suffice."""


class LayoutError(MicroscaleError, ValueError):
    """A file layout that cannot hold a format, a shape or an activation setting."""


class CheckpointError(MicroscaleError):
    """A checkpoint that is missing, damaged, inconsistent or of a kind that we cannot read."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A path that does not exist or holds no checkpoint."""


class CheckpointWriteError(CheckpointError, OSError):
    """Writing failed (full disk, no permission); nothing half-written was left at the target."""


class OptionError(MicroscaleError, ValueError, TypeError):
    """An option of a job that does not exist, is missing, is of another kind, or lies outside its limits."""


class RecipeError(MicroscaleError, ValueError):
    """A recipe or rule that is not valid; the message names the line where there is one."""


class ModelError(MicroscaleError):
    """A model that cannot be loaded or is not of a kind that the operation takes."""


class TextError(MicroscaleError, ValueError):
    """A text that is too short, empty or not readable for what was asked."""


class CalibrationError(MicroscaleError, ValueError):
    """Calibration data that lacks what is asked of it, does not fit together, is not finite, singular or damaged."""


class TaskError(MicroscaleError, ValueError):
    """An evaluation task that is unknown or cannot run, or whose data is absent, damaged or of another form."""


class StudyError(MicroscaleError, ValueError):
    """A study file that is not valid, or a results file that is damaged or belongs to another study."""


class AllocationError(MicroscaleError, ValueError):
    """A budget, a candidate or a fixed choice that formats cannot be allocated under."""


class DependencyError(MicroscaleError, ImportError):
    """An optional library is absent; the message names the extra to install."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed; run: pip install {library}"
            f" (part of microscale[{extra}])"
        )


class GradientNote(UserWarning):
    """Layers of a quantized model run on a slower backend, because a gradient was asked for that kernels do not record.

    Issued once for each model that :func:`microscale.quantize` or :func:`microscale.load` returned.
    """


class QuantizationNote(UserWarning):
    """What a user of :func:`microscale.quantize` should know: what runs otherwise than asked, or does nothing.

    Issued as a warning; the command line prints the same texts as notes.
    """


class ArgumentError(MicroscaleError, TypeError):
    """An argument of another kind than the function takes."""


def check_kind(
    value: object,
    kinds: type | tuple[type, ...],
    name: str,
    expected: str,
    *,
    error: type[MicroscaleError] = ArgumentError,
) -> None:
    """Refuse an argument that is of none of the kinds; True and False count as numbers nowhere.

    Raises:
        ArgumentError: (or ``error``) with what was expected and what came.
    """
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise error(f"{name} must be {expected}, got {shown(value)}")


def is_path(value: object) -> bool:
    """Whether a value can name a file: a text or a path, not empty, without NUL, of characters that names may have."""
    if not isinstance(value, str | os.PathLike):
        return False
    try:
        name = os.fsencode(cast("str | os.PathLike[str]", value))
    except UnicodeEncodeError:
        return False
    return name != b"" and b"\0" not in name


def check_path(value: object, name: str, expected: str, *, error: type[MicroscaleError] = ArgumentError) -> None:
    """Refuse what can name no file, see :func:`is_path`.

    Raises:
        ArgumentError: (or ``error``) with what was expected and what came.
    """
    if not is_path(value):
        raise error(f"{name} must be {expected}, not empty and without NUL, got {shown(value)}")


def shown(value: object) -> str:
    """Return a short text of a value for a message: itself where that is short, and its type."""
    if value is None:
        return "None"
    kind = type(value).__name__
    plain = isinstance(value, str | bytes | bool | int | float | list | tuple | dict)
    is_long = isinstance(value, int) and value.bit_length() > 200  # Python writes no number of any length
    text = repr(cast("object", value)) if plain and not is_long else ""
    return f"{text} ({kind})" if 0 < len(text) <= 60 else f"a value of type {kind}"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: 1 layer, 2 layers, 1,000 layers; ``plural`` where it takes no s."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def nearest(word: object, known: abc.Iterable[str], *, most: int = 1) -> str:
    """Return the question ``; did you mean …?`` for a word that is none of those known, empty where none is close."""
    near = difflib.get_close_matches(str(word).lower(), list(known), n=most, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""
