"""Choose the backend of an operation, say why not the others, and count what ran.

The first backend of :data:`BACKENDS` without a refusal is taken. The backends are the folders beside this file: each
package with a ``BACKEND`` is found by itself, and another can be added with :func:`add_backend`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from microscale.errors import KernelError, check_kind
from microscale.kernels.backend import Backend, Operation, Request, check_backend
from microscale.kernels.remedy import remedy
from microscale.layouts import add_layout, remove_layout

BACKENDS: list[Backend] = []
"""All backends, the preferred one first."""


def add_backend(backend: Backend) -> None:
    """Add a backend with the memory layouts that it owns; its rank says where it stands among the others.

    Raises:
        KernelError: there is one of this name, or a field of the record is of a wrong kind.
        LayoutError: there is a layout of the name of one of its layouts.
    """
    check_kind(backend, Backend, "a backend", "a Backend record")
    check_backend(backend)
    if any(other.name == backend.name for other in BACKENDS):
        raise KernelError(f"there is a backend {backend.name!r} already; give this one a name of its own")
    for layout in backend.layouts:
        add_layout(layout)
    BACKENDS.append(backend)
    BACKENDS.sort(key=lambda each: each.rank)


def remove_backend(name: str) -> None:
    """Take a backend and its memory layouts out again; no tensor may be left in one of them.

    Raises:
        KernelError: there is none of this name.
    """
    check_kind(name, str, "the name of a backend", "a text")
    backend = next((each for each in BACKENDS if each.name == name), None)
    if backend is None:
        raise KernelError(f"there is no backend {name!r}; there are: {', '.join(each.name for each in BACKENDS)}")
    BACKENDS.remove(backend)
    for layout in backend.layouts:
        remove_layout(layout.name)


def _add_folders() -> None:
    for found in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if found.ispkg:
            add_backend(importlib.import_module(f"{__package__}.{found.name}").BACKEND)


def why_not(request: Request) -> dict[str, str | None]:
    """Return every backend's reason for refusing the request (None: it can run it)."""
    check_kind(request, Request, "a request", "a Request record")
    return {backend.name: backend.refusal(request) for backend in BACKENDS}


def choose(*requests: Request) -> Backend:
    """Return the first backend that can run every one of the requests of one call.

    Raises:
        KernelError: none can; every backend is listed with its reason, and what could be changed.
    """
    for backend in BACKENDS:
        if all(backend.refusal(request) is None for request in requests):
            return backend
    request = next((each for each in requests if BACKENDS[-1].refusal(each) is not None), requests[0])
    reasons = "\n".join(f"  {name}: {reason}" for name, reason in why_not(request).items())
    advice = remedy(request, lambda other: any(each.refusal(other) is None for each in BACKENDS))
    raise KernelError(f"no backend can run {request}:\n{reasons}\n{advice}")


def why_not_compiled(*requests: Request) -> str | None:
    """Return why nothing but the backend that takes everything can run the parts of one call; None: another can."""
    reasons: list[str] = []
    for backend in BACKENDS[:-1]:
        found = [reason for request in requests if (reason := backend.refusal(request)) is not None]
        if not found:
            return None
        reasons.append(found[0])
    return "; ".join(reasons) or "there are no compiled kernels"


def execute(requests: Request | Sequence[Request], *arguments: Any, **keywords: Any) -> Any:
    """Run an operation on the backend that :func:`choose` names; several requests are the parts of one call."""
    parts = (requests,) if isinstance(requests, Request) else requests
    backend = choose(*parts)
    operation = parts[0].operation
    for counts in _COUNTS:
        counts[operation, backend.name] += 1
    return backend.implementations[operation](*arguments, **keywords)


Executions = Counter[tuple[Operation, str]]
"""How often each operation ran on each backend, by the name of the backend."""

_COUNTS: list[Executions] = []


@contextmanager
def count_executions() -> Generator[Executions, None, None]:
    """Count which backend ran each operation inside the block."""
    counts: Executions = Counter()
    _COUNTS.append(counts)
    try:
        yield counts
    finally:
        _COUNTS[:] = [each for each in _COUNTS if each is not counts]


@contextmanager
def uncounted() -> Generator[None, None, None]:
    """Let nobody count what runs inside the block: trials, and what was counted already."""
    before = list(_COUNTS)
    _COUNTS.clear()
    try:
        yield
    finally:
        _COUNTS[:] = before


def note_executions(executions: Executions) -> None:
    """Count operations that ran past :func:`execute`: those of a plan, bound before."""
    for counts in _COUNTS:
        counts.update(executions)


_add_folders()
