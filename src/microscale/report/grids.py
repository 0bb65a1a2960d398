"""Draw the values that a format can hold, as plain text for a terminal.

Elements of up to 6 bits get a number line and the list of their values; wider ones, and those whose values crowd
near zero, get a table of how many values lie in each binade (from a power of two up to the next). All numbers are
multiples of the block's scale. Negative values mirror the positive ones and are not drawn; where they do not
mirror (unsigned integers, ``-full``), a line says so.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from microscale.formats import BlockFormat, Element, Format, IntElement, SegmentedFormat, format_name, parse_format
from microscale.formats.rules import number_word

DEFAULT_WIDTH = 78
MIN_WIDTH = 40
MAX_LISTED_BITS = 6
"""Elements of up to this many bits are drawn value by value."""


def value_grid_text(fmt: Format | str, width: int = DEFAULT_WIDTH) -> str:
    """Return the value grid of a format in lines of at most ``width`` characters (at least 40).

    Under MX+ and MX++ the grid of the block's largest element follows on the same axis; a pair shows both of its
    formats.
    """
    record = parse_format(fmt)
    width = max(width, MIN_WIDTH)
    if isinstance(record, BlockFormat):
        return "\n".join(_block_format_lines(record, width))
    if isinstance(record, SegmentedFormat):
        parts = dict.fromkeys(part for part, _ in record.places())
        blocks = [[*_wrapped(f"{format_name(part)}:", width), *_block_format_lines(part, width)] for part in parts]
        return "\n\n".join("\n".join(block) for block in blocks)
    lines = [*_wrapped("blocks of the narrow format:", width), *_block_format_lines(record.low, width), ""]
    lines += [*_wrapped("blocks of the wide format:", width), *_block_format_lines(record.high, width)]
    return "\n".join(lines)


def positive_values(element: Element) -> list[float]:
    """Return zero and all positive finite values of an element, ascending."""
    return [element.value(code) for code in range(element.max_code + 1)]


def largest_element_values(fmt: BlockFormat) -> list[float]:
    """Return the positive values of a block's largest element under MX+: 2^e_max * (1 + f / 2^B)."""
    bits = fmt.magnitude_bits
    return [math.ldexp(2**bits + fraction, fmt.element.max_exponent - bits) for fraction in range(2**bits)]


def _block_format_lines(fmt: BlockFormat, width: int) -> list[str]:
    element = fmt.element
    values = positive_values(element)
    largest = largest_element_values(fmt) if fmt.is_extended else None
    lines = _wrapped(_heading(fmt, values), width)
    if element.bits <= MAX_LISTED_BITS:
        top = max(values[-1], largest[-1] if largest else 0.0)
        lines += [*_number_line(values, top, width), *_value_list(values, width)]
        if _is_crowded(values, top, width):
            lines += ["", *_binade_lines(values, width)]
        if largest is not None:
            lines += ["", *_wrapped(_largest_heading(largest), width)]
            lines += [*_number_line(largest, top, width), *_value_list(largest, width)]
    else:
        lines += _binade_lines(values, width)
        if largest is not None:
            lines += ["", *_wrapped(_largest_heading(largest), width), *_binade_lines(largest, width)]
    return lines


def _heading(fmt: BlockFormat, values: Sequence[float]) -> str:
    element = fmt.element
    word = f"{element.name}: {len(values)} values from 0 to {_power_or_number(values[-1])}"
    if fmt.zero_point is not None:
        return f"{word}, minus the block's zero point, times its scale"
    if not element.signed:
        return f"{word}, times the block's scale; no negative values"
    if isinstance(element, IntElement) and not element.symmetric:
        lowest = element.value(element.min_code & (2**element.bits - 1))
        return f"{word}, times the block's scale; below zero the same and {number_word(lowest)}"
    return f"{word}, times the block's scale; the same below zero"


def _largest_heading(values: Sequence[float]) -> str:
    first, last = number_word(values[0]), number_word(values[-1])
    step = number_word(values[1] - values[0])
    return f"the block's largest element: {len(values)} values from {first} to {last}, step {step}"


def _columns(values: Sequence[float], top: float, width: int) -> list[int]:
    return [round(value / top * (width - 1)) for value in values]


def _is_crowded(values: Sequence[float], top: float, width: int) -> bool:
    columns = _columns(values, top, width)
    return len(set(columns)) < len(columns)


def _number_line(values: Sequence[float], top: float, width: int) -> list[str]:
    """Two lines: labels where they fit, and the axis from 0 to ``top`` with a tick for each value."""
    axis = ["─"] * width
    columns = _columns(values, top, width)
    for column in columns:
        axis[column] = "╋" if columns.count(column) > 1 else "┼"
    axis[0] = {"─": "╶", "┼": "├", "╋": "┣"}[axis[0]]
    axis[-1] = {"─": "╴", "┼": "┤", "╋": "┫"}[axis[-1]]
    return [_label_line(values, columns, width), "".join(axis)]


def _label_line(values: Sequence[float], columns: Sequence[int], width: int) -> str:
    """Write as many labels as fit: the ends first, then powers of two from the top, then the others."""
    line = [" "] * width
    used = [False] * (width + 1)

    def rank(position: int) -> tuple[int, float]:
        value = values[position]
        is_end = position in (0, len(values) - 1)
        is_power = value > 0 and math.frexp(value)[0] == 0.5
        return (0 if is_end else 1 if is_power else 2, -value)

    for position in sorted(range(len(values)), key=rank):
        label = number_word(values[position])
        start = min(max(columns[position] - len(label) // 2, 0), width - len(label))
        span = range(max(start - 1, 0), min(start + len(label) + 1, width))
        if any(used[place] for place in span):
            continue
        for offset, character in enumerate(label):
            line[start + offset] = character
            used[start + offset] = True
    return "".join(line).rstrip()


def _value_list(values: Sequence[float], width: int) -> list[str]:
    return textwrap.wrap("  ".join(number_word(value) for value in values), width)


def _binade_lines(values: Sequence[float], width: int) -> list[str]:
    """One line for each run of binades with the same number of values, with a bar for that number."""
    counts: dict[int, int] = {}
    for value in values:
        if value > 0:
            exponent = math.frexp(value)[1] - 1
            counts[exponent] = counts.get(exponent, 0) + 1
    runs: list[tuple[int, int, int]] = []
    for exponent, count in sorted(counts.items()):
        if runs and runs[-1][2] == count and runs[-1][1] == exponent - 1:
            runs[-1] = (runs[-1][0], exponent, count)
        else:
            runs.append((exponent, exponent, count))
    names = [_power(first) if first == last else f"{_power(first)} … {_power(last)}" for first, last, _ in runs]
    name_width = max(len(name) for name in ("binade", *names))
    most = max(count for _, _, count in runs)
    count_width = max(len("values"), len(str(most)))
    bar_width = min(most, width - name_width - count_width - 4)
    lines = [f"{'binade':<{name_width}}  {'values':>{count_width}}"]
    for name, (_, _, count) in zip(names, runs, strict=True):
        bar = "█" * max(1, round(count / most * bar_width))
        lines.append(f"{name:<{name_width}}  {count:>{count_width}}  {bar}")
    return lines


def _power(exponent: int) -> str:
    return f"2^{exponent}"


def _power_or_number(value: float) -> str:
    is_power = math.frexp(value)[0] == 0.5
    return _power(math.frexp(value)[1] - 1) if is_power and not 1e-3 <= value < 1e6 else number_word(value)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width)
