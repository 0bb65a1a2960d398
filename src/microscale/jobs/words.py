"""The words of formats where layers are counted: those of segments without what differs from layer to layer."""

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
