"""Templates of the pages."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from microscale.errors import DependencyError


def page_template(name: str) -> Any:
    """Return a template of this room, which escapes what it shows and refuses unknown names.

    Raises:
        DependencyError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise DependencyError("jinja2", extra="report", purpose="the HTML report") from None
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(files("microscale.report").joinpath(f"templates/{name}").read_text(encoding="utf-8"))
