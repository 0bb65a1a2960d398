"""What really ran: calls counted by operation and backend, as a record and in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from microscale.kernels import BACKENDS
from microscale.kernels.backend import Operation

Executed = Mapping[str, Mapping[str, int]]
"""How often each operation ran on each backend, both by name."""

LINEAR = (Operation.LINEAR, Operation.LINEAR_MIXED)


def by_name(counts: Mapping[tuple[Operation, str], int]) -> dict[str, dict[str, int]]:
    """Return counts of :func:`microscale.kernels.count_executions` by the names of operations, in their order."""
    found: dict[str, dict[str, int]] = {}
    for operation in Operation:
        calls = {backend: count for (ran, backend), count in sorted(counts.items(), key=_backend) if ran is operation}
        if calls:
            found[operation.value] = calls
    return found


def _backend(item: tuple[tuple[Operation, str], int]) -> str:
    return item[0][1]


def summed(parts: Iterable[Executed]) -> dict[str, dict[str, int]]:
    """Return the sums of several counts."""
    total: Counter[tuple[Operation, str]] = Counter()
    for part in parts:
        for operation, calls in part.items():
            total.update({(Operation(operation), backend): count for backend, count in calls.items()})
    return by_name(total)


def linear_words(executed: Executed) -> str:
    """Say which backends ran how many calls of quantized linear layers, the most first."""
    calls: Counter[str] = Counter()
    for operation in LINEAR:
        calls.update(executed.get(operation.value, {}))
    if not calls:
        return "no quantized linear layer ran"
    titles = {backend.name: backend.title for backend in BACKENDS}
    first, *others = [(titles.get(name, name), count) for name, count in calls.most_common()]
    words = f"{first[1]:,} of {calls.total():,} linear calls on the {first[0]}"
    return ", ".join([words, *(f"{count:,} on the {title}" for title, count in others)])
