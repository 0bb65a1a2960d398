"""The C++ sources keep to what a reader can hold: files of at most 400 lines, functions of at most 60."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".h"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

NO_CODE = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|^\s*#(?:[^\n]*\\\n)*[^\n]*', re.MULTILINE)
NO_FUNCTION = re.compile(r"^(?:template\s*<[^{]*>\s*)?(?:namespace|struct|class|enum|extern|union)\b")


def functions(text: str) -> dict[str, int]:
    """Return the lines of every function by its head; lambdas and blocks count with the function around them."""
    code = NO_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    open_braces: list[tuple[bool, int, str]] = []
    found: dict[str, int] = {}
    start = 0
    for place, character in enumerate(code):
        if character == "{":
            head = code[start:place]
            is_inside = any(is_function for is_function, _, _ in open_braces)
            is_function = not is_inside and "(" in head and not NO_FUNCTION.match(head.strip())
            open_braces.append((is_function, place - len(head.lstrip()), head.strip()))
        elif character == "}":
            is_function, begin, head = open_braces.pop()
            if is_function:
                found[head] = code.count("\n", begin, place) + 1
        if character in "{};" and not any(is_function for is_function, _, _ in open_braces):
            start = place + 1
    assert not open_braces
    return found


def test_functions_are_counted() -> None:
    text = "namespace a {\nint two(int x) {\n  if (x) {\n  }\n}\nstruct B {\n  int one() { return '{'; }\n};\n}\n"
    assert functions(text) == {"int two(int x)": 4, "int one()": 1}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_a_source_is_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    assert {head: lines for head, lines in functions(text).items() if lines > MAX_FUNCTION_LINES} == {}
