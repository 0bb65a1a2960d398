"""The shapes and dtypes that the package's annotations name, checked while its tests run.

``install`` hooks the import of microscale: every function, method, property and dataclass of it whose annotations name
a jaxtyping type is wrapped as soon as its module has run. jaxtyping binds the dimensions, beartype walks unions and
containers. Plain types are pyright's business and are not looked at.

The check comes *after* the call, with the arguments and the result together: a wrong argument that the function itself
refuses ends in the function's own error, and one that it lets through ends here. Calls under torch.compile are not
checked, nor are functions inside functions.

jaxtyping's own import hook is not used: it wraps every function, so it slows each call and checks before the call, and
it does not see a package that an editable installation finds in another way than by a path.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import FunctionType, ModuleType
from typing import Any

import torch
from beartype.door import is_bearable
from jaxtyping import jaxtyped

PACKAGE = "microscale"
OFF_VARIABLE = "MICROSCALE_NO_SHAPE_CHECKS"

_SHAPED = re.compile(r"\w+\[Tensor, ['\"]")


class WrongShape(AssertionError):
    """A tensor inside the package is not what its annotation says."""


def install() -> None:
    """Check the modules of the package that are imported from now on, unless the variable turns it off."""
    if not os.environ.get(OFF_VARIABLE):
        assert PACKAGE not in sys.modules, f"{PACKAGE} was imported before its shapes could be checked"
        sys.meta_path.insert(0, _Finder())


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a check after each call; itself where no annotation names a shape."""
    hints = _shape_hints(function.__annotations__, inspect.unwrap(function).__globals__)
    if not hints:
        return function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not torch.compiler.is_compiling():
            values = signature.bind(*args, **kwargs).arguments
            values["return"] = result
            _check(f"{function.__module__}.{function.__qualname__}", hints, values)
        return result

    return call


def check_class(cls: type) -> None:
    """Wrap the methods and properties of a class, and check a dataclass's fields once they are set."""
    for name, member in list(vars(cls).items()):
        if isinstance(member, FunctionType) and name != "__init__":
            setattr(cls, name, checked(member))
        elif isinstance(member, (staticmethod, classmethod)):
            setattr(cls, name, type(member)(checked(member.__func__)))
        elif isinstance(member, property) and member.fget is not None:
            setattr(cls, name, property(checked(member.fget), member.fset, member.fdel, member.__doc__))
    start = vars(cls).get("__init__")
    if not dataclasses.is_dataclass(cls):
        if start is not None:
            cls.__init__ = checked(start)
        return
    hints = _shape_hints(vars(cls).get("__annotations__", {}), vars(sys.modules[cls.__module__]))
    if hints and start is not None:

        @functools.wraps(start)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            start(self, *args, **kwargs)
            _check(f"{cls.__module__}.{cls.__qualname__}", hints, {name: getattr(self, name) for name in hints})

        cls.__init__ = init


def _shape_hints(annotations: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    """Return the annotations, written as text, that name a jaxtyping type."""
    found = {name: text for name, text in annotations.items() if isinstance(text, str) and _SHAPED.search(text)}
    return {name: eval(text, names) for name, text in found.items()}


def _check(where: str, hints: dict[str, Any], values: dict[str, Any]) -> None:
    with jaxtyped("context"):
        for name, hint in hints.items():
            if name in values and not is_bearable(values[name], hint):
                others = {key: _described(values[key]) for key in hints if key in values}
                raise WrongShape(f"{where}: {name} is {others.pop(name)}, not {hint}; beside it: {others}")


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {', '.join(map(_described, value[:3]))}"
    return repr(value) if value is None else type(value).__name__


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for name, member in list(vars(module).items()):
            if getattr(member, "__module__", None) == module.__name__:
                if isinstance(member, FunctionType):
                    setattr(module, name, checked(member))
                elif isinstance(member, type):
                    check_class(member)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.origin is not None and spec.origin.endswith(
                    ".py"
                ):  # whatever an editable install puts around it
                    spec.loader = _Loader(fullname, spec.origin)
                return spec
        return None
