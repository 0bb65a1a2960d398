"""The picture of ``microscale allocate``: budget against summed sensitivity, of the optima and of uniform formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from microscale.errors import AllocationError, DependencyError

SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is measured.

    Raises:
        AllocationError: a suffix that stands for no kind of picture, or no such directory.
        DependencyError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise AllocationError(f"a plot is written as {', '.join(SUFFIXES)}, got {path.name!r}")
    if not path.absolute().parent.is_dir():
        raise AllocationError(f"the directory {path.absolute().parent} of the plot does not exist")
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise DependencyError("matplotlib", extra="report", purpose="the plot") from None


def allocation_plot(
    path: Path,
    front: Sequence[tuple[float, float]],
    uniform: Mapping[str, tuple[float, float]],
    chosen: tuple[float, float],
    *,
    across: str,
    up: str,
    title: str,
) -> None:
    """Draw (cost, sensitivity) of the optima as a line, of uniform formats and of the choice as marks, and save it."""
    check_picture(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([x for x, _ in front], [y for _, y in front], ".-", color="#1f5fae", label="optimum")
    for name, (x, y) in uniform.items():
        axes.plot([x], [y], "o", color="#c2571a")
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.plot([], [], "o", color="#c2571a", label="one format for all")
    axes.plot([chosen[0]], [chosen[1]], "*", color="#2f8f4e", markersize=13, label="this recipe")
    positive = [y for _, y in (*front, *uniform.values(), chosen) if y > 0]
    if positive and max(positive) / min(positive) > 20:
        axes.set_yscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)
