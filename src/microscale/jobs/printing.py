"""How the result of a job becomes JSON: one way for Python and for ``--json`` of the command line."""

from __future__ import annotations

import json
import math
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class HasJson(Protocol):
    """A result that knows its JSON."""

    def as_json(self) -> Any:
        """Return it as lists, dictionaries and plain values."""
        ...


def json_value(result: Any) -> Any:
    """Return a result, or a plain value, as JSON can hold it: keys are texts, NaN and Inf are None."""
    if isinstance(result, HasJson):
        result = result.as_json()
    if isinstance(result, float) and not math.isfinite(result):
        return None
    if isinstance(result, dict):
        return {str(key): json_value(item) for key, item in result.items()}
    if isinstance(result, list | tuple):
        return [json_value(item) for item in result]
    return result


def json_text(result: Any) -> str:
    """Return a result, or a plain value, as strict JSON, indented."""
    return json.dumps(json_value(result), ensure_ascii=False, indent=2)
