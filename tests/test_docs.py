"""Every Python example in README.md and docs/*.md runs, and the tables of docs/reference/formats.md match the registry.

A fenced block marked `python` is run in the namespace of its file, top to bottom: as a doctest where it has `>>>`
prompts, else as a script. A block whose first line is `# not run: REASON` is left out.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest

from microscale.algorithms.pipeline import ORDER
from microscale.algorithms.registry import STEPS
from microscale.formats import NAMED_ELEMENTS, NAMED_FORMATS, FloatElement, parse_format, spec_text

REPO_ROOT = Path(__file__).resolve().parents[1]
PAGES = [REPO_ROOT / "README.md", *sorted((REPO_ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"# not run: \S")


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Return (line number, code) of each block that is to be run."""
    blocks = [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in FENCE.finditer(text)]
    return [(line, code) for line, code in blocks if not NOT_RUN.match(code)]


def run_block(code: str, path: Path, line: int, namespace: dict[str, Any]) -> None:
    """Run one block; a doctest that gives something else than written fails with both."""
    if ">>> " not in code:
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)
        return
    test = doctest.DocTestParser().get_doctest(code, namespace, path.name, str(path), line - 1)
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append, clear_globs=False)
    namespace.update(test.globs)
    if report:
        pytest.fail("".join(report), pytrace=False)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_examples_of_a_page_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(REPO_ROOT / "examples")  # a page is written for the repository's root
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in python_blocks(path.read_text("utf-8")):
        run_block(code, path, line, namespace)


def test_a_wrong_example_fails() -> None:
    page = Path("page.md")
    run_block(">>> 1 + 1\n2\n", page, 1, {})
    with pytest.raises(pytest.fail.Exception, match=r"Expected:\n    3\nGot:\n    2"):
        run_block(">>> 1 + 1\n3\n", page, 1, {})
    with pytest.raises(ZeroDivisionError):
        run_block("x = 1\nx / 0\n", page, 1, {})


def test_blocks_share_a_namespace_and_can_be_left_out() -> None:
    first, left_out, text_block = (
        "```python\nx = 1\n```\n",
        "```python\n# not run: why\nboom()\n```\n",
        "```text\nno\n```\n",
    )
    text = f"a\n{first}{left_out}{text_block}```python\n>>> x\n1\n```\n"
    blocks = python_blocks(text)
    assert [(line, code) for line, code in blocks] == [(3, "x = 1\n"), (13, ">>> x\n1\n")]
    namespace: dict[str, Any] = {}
    for line, code in blocks:
        run_block(code, Path("page.md"), line, namespace)


def test_a_reason_is_needed_to_leave_a_block_out() -> None:
    assert python_blocks("```python\n# not run:\nboom()\n```\n")


def table_rows(heading: str, page: str = "reference/formats.md") -> list[list[str]]:
    """Return the cells of the first table under a heading of a page, without its head."""
    text = (REPO_ROOT / "docs" / page).read_text("utf-8")
    section = text.split(f"\n{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    assert lines
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def test_the_table_of_names_is_the_registry() -> None:
    written = [
        (cells[0].split("`")[1], cells[1], cells[2].strip("`"), float(cells[3]))
        for cells in table_rows("## The formats by name")
    ]
    assert written == [
        (name, named.title, spec_text(named.format), named.format.bits_per_value())
        for name, named in NAMED_FORMATS.items()
    ]


def number(cell: str) -> float:
    return float(eval(cell.replace("^", "**"), {}))


def test_the_table_of_elements_is_the_code() -> None:
    rows = table_rows("### Floats: `eXmY`")
    elements = {name: element for name, element in NAMED_ELEMENTS.items() if isinstance(element, FloatElement)}
    assert [cells[0].strip("`") for cells in rows] == list(elements)
    for name, bits, bias, largest, normal, smallest, e_max, _ in rows:
        element = elements[name.strip("`")]
        assert (int(bits), int(bias), int(e_max)) == (element.bits, element.bias, element.max_exponent)
        assert (number(largest), number(smallest)) == (element.max_value, element.min_value)
        assert normal == "none" or number(normal) == element.min_normal


def test_every_spec_in_a_table_parses() -> None:
    text = (REPO_ROOT / "docs" / "reference" / "formats.md").read_text("utf-8")
    sections = [
        text.split("\n## The spec grammar\n")[1].split("\n## ")[0],
        text.split("\n## What others call MXFP4\n")[1],
    ]
    specs = [
        spec
        for section in sections
        for line in section.splitlines()
        if line.startswith("| ")
        for spec in re.findall(r"`((?:mxfp|mxint|nvfp|pair|int|e\d)[^`]*)`", line)
    ]
    assert len(specs) > 35
    for spec in specs:
        assert parse_format(spec_text(parse_format(spec))) == parse_format(spec)


def test_the_table_of_steps_is_the_registry() -> None:
    rows = table_rows("## Kinds of steps, in the order of a chain", "reference/methods.md")
    written = [(kind, tuple(re.findall(r"`(\w+)`", steps))) for kind, _, steps in rows]
    assert written == [
        (kind.__name__.removesuffix("Step").lower(), tuple(n for n, step in STEPS.items() if issubclass(step, kind)))
        for kind in ORDER
    ]
