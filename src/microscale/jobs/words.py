"""Words for people: of formats where layers are counted, and of lengths of time."""

from __future__ import annotations

from microscale.formats import ActivationSpec, Format, SegmentedFormat, format_name


def format_word(fmt: Format) -> str:
    """Return the name of a format; of segments the formats without their columns, which differ from layer to layer."""
    if not isinstance(fmt, SegmentedFormat):
        return format_name(fmt)
    return f"segments of {' | '.join(dict.fromkeys(format_name(part) for part, _ in fmt.places()))}"


def activation_word(activations: ActivationSpec | None) -> str:
    """Return the word of an activation setting, of segments as :func:`format_word` does; ``None`` for none."""
    if activations is not None and isinstance(activations.format, SegmentedFormat):
        return format_word(activations.format)
    return str(activations)


def duration_text(seconds: float) -> str:
    """Return a length of time in the largest units that say enough: 45 s, 12 min, 1 h 5 min."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours = minutes // 60
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if minutes % 60 and hours < 10 else f"{hours} h"
