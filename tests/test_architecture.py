"""The import rule of docs/architecture.md, checked on the syntax tree of every file in src/microscale.

A room imports rooms of smaller rows (or itself), never sideways and never inside a function; a third party beyond
NumPy, torch and the typing helpers is imported in exactly one room; only cli/ prints. Imports under
`if TYPE_CHECKING` count like any other. A lazy import by literal name (`importlib.import_module("...")`) may load
an optional part of the module's own room, which is how a backend waits until it is used. The folder of a backend is
imported by its own modules alone; the reference's may be by all, for it defines the operations.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]
PACKAGE_DIR = REPO_ROOT / "src" / "microscale"
PLAN = REPO_ROOT / "docs" / "architecture.md"

ROWS = {
    "errors": 0,
    "version": 0,
    "formats": 1,
    "families": 2,
    "layouts": 2,
    "transforms": 2,
    "layer_spec": 3,
    "tensor": 3,
    "kernels": 4,
    "checkpoint": 4,
    "calibration": 4,
    "algorithms": 5,
    "nn": 5,
    "evaluation": 6,
    "layerwise": 6,
    "recipes": 7,
    "training": 7,
    "planning": 8,
    "report": 8,
    "studies": 9,
    "integrations": 10,
    "jobs": 11,
    "cli": 12,
}
# Single modules that belong to a room without lying in its folder.
ROOM_OF_MODULE = {"hf": "integrations", "__init__": "cli", "__main__": "cli"}
# Rooms that translate or parse: they may import our own modules inside a function, to start fast.
LAZY_ROOMS = {"integrations", "jobs", "cli"}

EVERYWHERE = {"numpy", "torch", "jaxtyping", "typing_extensions"}
ROOMS_OF_THIRD_PARTY = {
    "compressed_tensors": "integrations",
    "datasets": "integrations",
    "gguf": "checkpoint",
    "huggingface_hub": "integrations",
    "jinja2": "report",
    "lm_eval": "integrations",
    "matplotlib": "report",
    "peft": "integrations",
    "pydantic": "recipes studies",
    "pydantic_core": "recipes studies",
    "rich": "cli",
    "safetensors": "checkpoint",
    "scipy": "planning",
    "tokenizers": "integrations",
    "tqdm": "integrations",
    "transformers": "integrations",
    "triton": "kernels",
    "typer": "cli",
    "vllm": "integrations",
    "yaml": "recipes studies",
}

KERNELS = "microscale.kernels"
BACKEND_FOLDERS = {path.parent.name for path in (PACKAGE_DIR / "kernels").glob("*/__init__.py")} - {"reference"}

MAX_FILE_LINES = 400
LONG_FILES: dict[str, str] = {}
"""Files that are longer, each with its reason: the list may only shrink."""

UNTESTED: dict[str, str] = {}
"""Modules with logic and without a file of tests of their name, each with its reason: the list may only shrink."""


@dataclass(frozen=True)
class Import:
    """One imported dotted name, where it stands, and how."""

    name: str
    line: int
    is_in_function: bool
    is_by_string: bool


def room_of(dotted: str) -> str | None:
    """Return the room of a module of microscale, or None if the plan has no such room."""
    parts = dotted.split(".")
    head = parts[1] if len(parts) > 1 else "__init__"
    return head if head in ROWS else ROOM_OF_MODULE.get(head)


def module_of(path: Path) -> str:
    """Return the dotted name of a file given relative to the package, `__init__` included."""
    return ".".join(("microscale", *path.with_suffix("").parts))


def base_of_import_from(node: ast.ImportFrom, module: str) -> str:
    """Return the absolute dotted name behind the `from` of an import of the given module."""
    base = node.module or ""
    if not node.level:
        return base
    parents = module.split(".")[: -node.level]
    return ".".join([*parents, base] if base else parents)


def names_of_import_from(node: ast.ImportFrom, module: str) -> Iterator[str]:
    """Yield the absolute dotted names that a `from ... import ...` statement of the given module may load."""
    base = base_of_import_from(node, module)
    for alias in node.names:
        # `from microscale import formats` loads a room; `from microscale import quantize` needs the top level itself.
        yield f"{base}.{alias.name}" if base == "microscale" and room_of(f"microscale.{alias.name}") else base


def names_loaded_by(node: ast.AST, module: str) -> Iterator[str]:
    """Yield the dotted names that this one statement or call loads; nothing for any other node."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from names_of_import_from(node, module)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in {"import_module", "__import__"}:
            yield str(node.args[0].value)


def find_imports(node: ast.AST, module: str, is_in_function: bool = False) -> Iterator[Import]:
    """Walk a syntax tree and yield every import in it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.expr)):
            for name in dict.fromkeys(names_loaded_by(child, module)):
                yield Import(name, child.lineno, is_in_function, is_by_string=isinstance(child, ast.Call))
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from find_imports(child, module, is_in_function or is_function)


def complaint_about(found: Import, room: str) -> str | None:
    """Return what is wrong with one import seen from a room, or None."""
    package = found.name.partition(".")[0]
    if package != "microscale":
        if package in EVERYWHERE or package in sys.stdlib_module_names:
            return None
        if package not in ROOMS_OF_THIRD_PARTY:
            return f"third party {package!r} has no room: name it in ROOMS_OF_THIRD_PARTY and in docs/architecture.md"
        homes = ROOMS_OF_THIRD_PARTY[package].split()
        return None if room in homes else f"third party {package!r} may be imported in {homes[0]} only, not in {room}"
    target = room_of(found.name)
    if target is None:
        return f"{found.name} lies in no room of the plan"
    if target != room and ROWS[target] >= ROWS[room]:
        return f"{room} (row {ROWS[room]}) imports {target} (row {ROWS[target]})"
    if room in LAZY_ROOMS:
        return None
    if found.is_by_string:
        return None if target == room else f"{found.name} is imported by string; only a part of one's own room may be"
    return f"{found.name} is imported inside a function" if found.is_in_function else None


def backend_complaints(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Yield what is wrong with imports of a backend's folder: line and text."""
    for node in ast.walk(tree):
        names = list(names_loaded_by(node, module))
        if isinstance(node, ast.ImportFrom):
            names = [f"{base_of_import_from(node, module)}.{alias.name}" for alias in node.names]
        for name in names:
            backend = name.removeprefix(f"{KERNELS}.").partition(".")[0] if name.startswith(f"{KERNELS}.") else ""
            if backend in BACKEND_FOLDERS and not module.startswith(f"{KERNELS}.{backend}."):
                line = node.lineno if isinstance(node, (ast.stmt, ast.expr)) else 0
                yield line, f"kernels/{backend} is imported from outside: ask its record (microscale.kernels.BACKENDS)"


def find_violations(source: str, path: Path) -> list[str]:
    """Return every breach of the plan in one source text; path is relative to src/microscale."""
    module = module_of(path)
    room = room_of(module)
    if room is None:
        return [f"{path}: lies in no room of the plan"]
    tree = ast.parse(source)
    complaints = [(found.line, complaint_about(found, room)) for found in find_imports(tree, module)]
    complaints += backend_complaints(tree, module)
    if path.parts[0] != "cli" and path.name != "cli.py":
        complaints += [
            (node.lineno, "print() outside cli/")
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
    return [f"{path}:{line}: {text}" for line, text in sorted(c for c in complaints if c[1] is not None)]


def source_files() -> list[Path]:
    return sorted(path.relative_to(PACKAGE_DIR) for path in PACKAGE_DIR.rglob("*.py"))


def test_the_package_was_found() -> None:
    assert Path("__init__.py") in source_files()


def test_every_file_keeps_the_import_rule() -> None:
    violations = [v for path in source_files() for v in find_violations((PACKAGE_DIR / path).read_text("utf-8"), path)]
    assert not violations, "\n".join(violations)


def computes(source: str) -> bool:
    """Whether a module has a function that does more than to raise or to state its signature."""
    idle = (ast.Pass, ast.Raise)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = [
                each for each in node.body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
            ]
            if any(not isinstance(each, idle) for each in body):
                return True
    return False


def file_of_tests(path: Path) -> Path:
    """Return the file of tests of a module, given relative to the package; folders inside a room become words."""
    room, *words = path.with_suffix("").parts
    return Path("tests", f"test_{room}.py") if not words else Path("tests", room, f"test_{'_'.join(words)}.py")


@pytest.mark.parametrize(
    ("source", "does"),
    [
        ("X = 1\nclass A:\n    x: int", False),
        ('class A:\n    def f(self) -> int:\n        """Say."""\n        ...', False),
        ("def f():\n    raise NotImplementedError", False),
        ("class A:\n    def f(self):\n        return 1", True),
        ("async def f():\n    await g()", True),
    ],
)
def test_what_counts_as_logic(source: str, does: bool) -> None:
    assert computes(source) is does


def test_where_the_tests_of_a_module_lie() -> None:
    assert file_of_tests(Path("errors.py")) == Path("tests/test_errors.py")
    assert file_of_tests(Path("formats/block.py")) == Path("tests/formats/test_block.py")
    assert file_of_tests(Path("kernels/cpu/fused.py")) == Path("tests/kernels/test_cpu_fused.py")


def test_every_module_with_logic_has_a_file_of_tests_of_its_name() -> None:
    modules = [path for path in source_files() if not path.name.startswith("__")]
    found = {
        path.as_posix()
        for path in modules
        if computes((PACKAGE_DIR / path).read_text("utf-8")) and not (REPO_ROOT / file_of_tests(path)).is_file()
    }
    missing = [f"{name}: {file_of_tests(Path(name))}" for name in sorted(found - set(UNTESTED))]
    assert not missing, "write the tests of\n" + "\n".join(missing)
    assert set(UNTESTED) - found == set(), "tested by now, or gone: take them out of UNTESTED"


def test_the_compiled_backend_has_a_folder_of_its_own() -> None:
    assert "cpu" in BACKEND_FOLDERS


def test_files_are_short() -> None:
    lines = {path.as_posix(): (PACKAGE_DIR / path).read_text("utf-8").count("\n") for path in source_files()}
    too_long = {name for name, count in lines.items() if count > MAX_FILE_LINES}
    assert too_long - set(LONG_FILES) == set(), f"files of more than {MAX_FILE_LINES} lines: cut them"
    assert set(LONG_FILES) - too_long == set(), "short by now: take them out of LONG_FILES"


SWITCHES = {
    "overwrite": "what the user allows",
    "check": "what the user leaves out",
    "signed": "a fact of an element, under the name that its record has",
    "symmetric": "a fact of an element, under the name that its record has",
    "add_special_tokens": "a signature of lm_eval",
    "disable_tqdm": "a signature of lm_eval",
    "trust_remote_code": "the word of transformers, in load and where it is held",
}
"""Parameters that may be True or False, each with its reason: the list may only shrink."""


FACTS = ("is_", "has_", "needs_", "keeps_", "names_", "records_", "runs_")
"""How the name of a record's field begins that says a fact."""

FIELDS = {
    "FloatElement.signed": "a fact of an element, under the name of its literature",
    "FloatElement.subnormals": "a fact of an element, under the name of its literature",
    "IntElement.signed": "a fact of an element, under the name of its literature",
    "IntElement.symmetric": "a fact of an element, under the name of its literature",
}
"""Fields that may be True or False though their names do not say a fact, each with its reason: it may only shrink."""


def is_boolean(annotation: ast.expr | None) -> bool:
    """Whether an annotation is bool, or bool or None; a switch of the command line is Annotated[bool, Option(…)]."""
    return annotation is not None and "bool" in ast.unparse(annotation).split(" | ")


def public_parts(kind: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    """Yield the public functions, methods or classes of the package, and what makes public classes, with the file."""
    for path in source_files():
        waiting: list[ast.AST] = [ast.parse((PACKAGE_DIR / path).read_text("utf-8"))]
        while waiting:
            for node in ast.iter_child_nodes(waiting.pop()):
                name = getattr(node, "name", "_")
                if isinstance(node, ast.ClassDef) and not name.startswith("_"):
                    waiting.append(node)
                if isinstance(node, kind) and (not name.startswith("_") or name == "__init__"):
                    yield path.as_posix(), node


def test_no_parameter_chooses_by_true_and_false() -> None:
    """What chooses among ways to work is a named value, or two functions: a call then says which."""
    found: set[str] = set()
    wrong: list[str] = []
    for path, function in public_parts(ast.FunctionDef):
        assert isinstance(function, ast.FunctionDef)
        for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs):
            if is_boolean(argument.annotation):
                found.add(argument.arg)
                if argument.arg not in SWITCHES:
                    wrong.append(f"{path}: {function.name}({argument.arg})")
    assert not wrong, "name a value (an Enum, a word), or write two functions"
    assert set(SWITCHES) - found == set(), "gone: take it out of SWITCHES"


def test_a_field_that_is_true_or_false_says_a_fact() -> None:
    """But for the options of a method, which users write in its chain as ``name=true``."""
    found: set[str] = set()
    wrong: list[str] = []
    for path, record in public_parts(ast.ClassDef):
        assert isinstance(record, ast.ClassDef)
        is_step = path.startswith("algorithms/") and any(ast.unparse(base).endswith("Step") for base in record.bases)
        for field in record.body:
            if isinstance(field, ast.AnnAssign) and is_boolean(field.annotation) and not is_step:
                name = f"{record.name}.{ast.unparse(field.target)}"
                found.add(name)
                if name not in FIELDS and not ast.unparse(field.target).startswith(FACTS):
                    wrong.append(f"{path}: {name}")
    assert not wrong, f"name a value (an Enum, a word), or say a fact: {', '.join(FACTS)}"
    assert set(FIELDS) - found == set(), "gone: take it out of FIELDS"


CONTRACTS = ("kernels/ops.py", "kernels/decoder_ops.py", "kernels/plan.py", "kernels/layout.py", "kernels/reference/")
"""Operations, and their implementations in the folders of backends, have one name by intention."""

NUMBERS = "what a format or a call says, and its numbers in the extension"
SAME_NAMES = {
    **dict.fromkeys(("Combine", "Extension", "Gate", "Rounding", "ZeroPoint"), NUMBERS),
    "Progress": "what is called in between; jobs/ says it again, for it must start without torch",
    "part_specs": "the parts of a layout, said by each layout",
    "quantize": "a model by the job, a tensor by the operation",
}
"""Other names that stand in more than one module, each with its reason: the list may only shrink."""


def places_of_names() -> dict[str, list[str]]:
    """Return the modules that define each public function, class or type (an assigned name not all in capitals)."""
    places: dict[str, list[str]] = {}
    for path in source_files():
        for node in ast.parse((PACKAGE_DIR / path).read_text("utf-8")).body:
            name = getattr(node, "name", "_")
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = "_" if node.targets[0].id.isupper() else node.targets[0].id
            if not name.startswith("_"):
                places.setdefault(name, []).append(path.as_posix())
    return places


def num_meanings(name: str, paths: list[str]) -> int:
    """Count the modules of a name: an operation with its implementations as one, a job with its fronts as another."""
    fronts = [path for path in paths if path in ("__init__.py", f"jobs/{name}.py") or path.endswith("_command.py")]
    backends = tuple(f"kernels/{folder}/" for folder in BACKEND_FOLDERS)
    is_operation = any(path.startswith(CONTRACTS) for path in paths)
    operations = [path for path in paths if path.startswith((*CONTRACTS, *backends))] if is_operation else []
    return len(set(paths) - set(fronts) - set(operations)) + is_operation + (f"jobs/{name}.py" in fronts)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["kernels/ops.py", "kernels/reference/quantize.py", "kernels/cpu/linear.py"], 1),
        (["kernels/ops.py", "families/records.py"], 2),
        (["kernels/cpu/enums.py", "recipes/recipe.py"], 2),
        (["__init__.py", "cli/name_command.py", "jobs/name.py"], 1),
        (["jobs/name.py", "planning/allocation.py"], 2),
        (["jobs/other.py", "planning/allocation.py"], 2),
    ],
)
def test_how_meanings_are_counted(paths: list[str], expected: int) -> None:
    assert num_meanings("name", paths) == expected


def test_a_name_means_one_thing() -> None:
    several = {name: paths for name, paths in places_of_names().items() if num_meanings(name, paths) > 1}
    wrong = {name: paths for name, paths in several.items() if name not in SAME_NAMES}
    assert not wrong, "two meanings get two names, one meaning stands once"
    assert set(SAME_NAMES) - set(several) == set(), "gone: take it out of SAME_NAMES"


def test_the_plan_in_the_documentation_has_the_same_rows() -> None:
    documented: dict[str, int] = {}
    for row, rooms in re.findall(r"^\| (\d+) \| ([^|]+) \|", PLAN.read_text("utf-8"), flags=re.MULTILINE):
        documented |= {name: int(row) for name in re.findall(r"`(\w+)(?:/|\.py)`", rooms.split(" and ")[0])}
    assert documented == ROWS


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("formats/codec.py", "from microscale.errors import FormatError"),
        ("formats/codec.py", "from ..errors import FormatError"),
        ("formats/codec.py", "from . import spec\nfrom .spec import parse\nfrom microscale.formats.spec import parse"),
        ("formats/__init__.py", "from .spec import parse"),
        ("kernels/reference/gemm.py", "from ..ops import GEMM\nfrom ...tensor import QuantizedTensor"),
        ("kernels/dispatch.py", "def load():\n    return importlib.import_module('microscale.kernels.triton')"),
        ("kernels/dispatch.py", "def load():\n    import triton"),
        ("formats/codec.py", "import math\nimport numpy as np\nimport torch\nfrom jaxtyping import Float"),
        ("integrations/transformers.py", "def load():\n    import transformers\n    from microscale.nn import Linear"),
        ("__init__.py", "def load():\n    from microscale.recipes import apply\n    from microscale import formats"),
        ("__main__.py", "from microscale.cli import main"),
        ("hf.py", "from microscale.integrations import transformers"),
        ("cli/tables.py", "import rich\nimport typer\nimport microscale\nprint('fine here')"),
        ("report/page.py", "def render():\n    import matplotlib.pyplot as plt"),
        ("kernels/cpu/fused.py", "from microscale.kernels import reference\nfrom microscale.kernels.cpu import native"),
        ("nn/linear.py", "from microscale.kernels import linear\nfrom microscale.kernels.reference import BACKEND"),
    ],
)
def test_checker_accepts(path: str, source: str) -> None:
    assert find_violations(source, Path(path)) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("formats/codec.py", "import microscale.layouts", "formats (row 1) imports layouts (row 2)"),
        ("formats/codec.py", "from microscale import tensor", "formats (row 1) imports tensor (row 3)"),
        ("formats/codec.py", "from microscale import quantize", "formats (row 1) imports cli (row 12)"),
        ("formats/codec.py", "import microscale", "formats (row 1) imports cli (row 12)"),
        ("formats/codec.py", "from .. import nn", "formats (row 1) imports nn (row 5)"),
        ("formats/__init__.py", "from ..tensor import QuantizedTensor", "formats (row 1) imports tensor (row 3)"),
        ("formats/codec.py", "if TYPE_CHECKING:\n    from ..nn import Linear", "formats (row 1) imports nn (row 5)"),
        ("formats/codec.py", "def f():\n    from ..nn import Linear", "formats (row 1) imports nn (row 5)"),
        ("checkpoint/read.py", "from microscale.kernels import ops", "checkpoint (row 4) imports kernels (row 4)"),
        (
            "nn/linear.py",
            "try:\n    from ..algorithms import rtn\nfinally:\n    pass",
            "nn (row 5) imports algorithms (row 5)",
        ),
        ("errors.py", "from .formats import spec", "errors (row 0) imports formats (row 1)"),
        ("tensor.py", "from .kernels import ops", "tensor (row 3) imports kernels (row 4)"),
        ("planning/plan.py", "from microscale.hf import load", "planning (row 8) imports integrations (row 10)"),
        (
            "nn/linear.py",
            "def f():\n    from microscale.errors import E",
            "microscale.errors is imported inside a function",
        ),
        (
            "nn/linear.py",
            "class A:\n  def f(self):\n    from . import kv",
            "microscale.nn is imported inside a function",
        ),
        ("nn/linear.py", "importlib.import_module('microscale.kernels.ops')", "is imported by string"),
        ("nn/linear.py", "import_module('microscale.recipes')", "nn (row 5) imports recipes (row 7)"),
        ("nn/linear.py", "from microscale.extras import x", "microscale.extras lies in no room"),
        ("extras/x.py", "import math", "lies in no room"),
        ("nn/linear.py", "import transformers", "'transformers' may be imported in integrations only, not in nn"),
        ("nn/linear.py", "def f():\n    import rich.table", "'rich' may be imported in cli only, not in nn"),
        ("nn/linear.py", "importlib.import_module('gguf')", "'gguf' may be imported in checkpoint only, not in nn"),
        ("nn/linear.py", "import einops", "third party 'einops' has no room"),
        ("nn/linear.py", "def f():\n    print('x')", "print() outside cli/"),
        ("__main__.py", "print('x')", "print() outside cli/"),
        ("nn/linear.py", "from microscale.kernels import cpu", "kernels/cpu is imported from outside"),
        ("kernels/dispatch.py", "from . import cpu", "kernels/cpu is imported from outside"),
        ("kernels/reference/fused.py", "from ..cpu.native import level", "kernels/cpu is imported from outside"),
        ("kernels/dispatch.py", "import microscale.kernels.cpu.native", "kernels/cpu is imported from outside"),
        (
            "cli/app.py",
            "def f():\n    importlib.import_module('microscale.kernels.cpu')",
            "kernels/cpu is imported from outside",
        ),
    ],
)
def test_checker_reports(path: str, source: str, expected: str) -> None:
    violations = find_violations(source, Path(path))
    assert len(violations) == 1
    assert expected in violations[0]


def test_checker_names_file_and_line() -> None:
    assert find_violations("import math\n\nprint(1)\n", Path("nn/linear.py")) == [
        "nn/linear.py:3: print() outside cli/"
    ]


def test_the_files_that_the_plan_names_exist() -> None:
    """The paths of a weight and of a token name files and folders of src/microscale."""
    text = PLAN.read_text("utf-8")
    paths = text[text.index("## The path of one weight") : text.index("## Rooms")]
    named = re.findall(r"`([a-z_]+(?:/[a-z0-9_]*)*(?:\.py|/))`", paths)
    assert len(named) > 20
    assert [name for name in named if not (PACKAGE_DIR / name).exists()] == []
