"""Whether code that lies in a model's directory may run: only where the user says so, and nobody is asked meanwhile."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

_TRUSTED: ContextVar[bool] = ContextVar("trust_remote_code", default=False)

REFUSAL = (
    "{} holds code of its own, which runs only where you say so: read it, then give --trust-remote-code"
    " (trust_remote_code=True in Python)"
)


def is_trusted() -> bool:
    """Whether the code of a model may run."""
    return _TRUSTED.get()


@contextmanager
def trusting(trust_remote_code: bool) -> Generator[None, None, None]:
    """Let the code of models run inside, or forbid it; an outer permission stays."""
    token = _TRUSTED.set(trust_remote_code or _TRUSTED.get())
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def said_of(error: BaseException, path: object) -> str | None:
    """Return our words for a refusal of transformers to run a model's code, None for any other error."""
    return REFUSAL.format(path) if "trust_remote_code" in str(error) else None
