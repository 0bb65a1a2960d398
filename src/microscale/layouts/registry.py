"""The layouts by name, each with the same four functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from microscale.errors import LayoutError, check_kind
from microscale.formats import Format
from microscale.layouts import row_major
from microscale.layouts.row_major import PartSpec

Relayout = Callable[[Mapping[str, Tensor], Format, tuple[int, ...]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the bits of a quantized tensor lie.

    ``part_specs`` names the parts of a format and shape; ``refusal`` says why a format has no such layout, or None;
    ``pack`` turns the parts of row_major into those of this layout, ``unpack`` turns them back, bit for bit. Where all
    parts but those that ``is_shared`` names hold groups of ``row_group`` rows one after the other, that number is
    given.
    """

    name: str
    part_specs: Callable[[Format, tuple[int, ...]], dict[str, PartSpec]]
    refusal: Callable[[Format, tuple[int, ...]], str | None]
    pack: Relayout
    unpack: Relayout
    row_group: int | None = None
    is_shared: Callable[[str], bool] = lambda name: False


def _no_refusal(fmt: Format, shape: tuple[int, ...]) -> str | None:
    return None


def _same_parts(parts: Mapping[str, Tensor], fmt: Format, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return dict(parts)


_LAYOUTS: dict[str, Layout] = {
    row_major.NAME: Layout(
        name=row_major.NAME, part_specs=row_major.part_specs, refusal=_no_refusal, pack=_same_parts, unpack=_same_parts
    )
}

LAYOUTS: Mapping[str, Layout] = MappingProxyType(_LAYOUTS)
"""Every layout: row_major, which files hold, and those that the backends of :mod:`microscale.kernels` own."""


def add_layout(layout: Layout) -> None:
    """Add a memory layout; its owner is the backend whose kernels read it.

    Raises:
        LayoutError: there is another one of this name.
    """
    if _LAYOUTS.setdefault(layout.name, layout) is not layout:
        raise LayoutError(f"there is a layout {layout.name!r} already; give this one a name of its own")


def remove_layout(name: str) -> None:
    """Take a layout out again, with the backend that owns it.

    Raises:
        LayoutError: there is none of this name.
    """
    del _LAYOUTS[find_layout(name).name]


def find_layout(name: str) -> Layout:
    """Return a layout by its name.

    Raises:
        LayoutError: there is none of this name.
    """
    check_kind(name, str, "the name of a layout", f"one of {', '.join(LAYOUTS)}", error=LayoutError)
    if name not in LAYOUTS:
        raise LayoutError(f"unknown layout {name!r} of a tensor; possible: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
