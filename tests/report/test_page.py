"""Templates of the pages: all are there, escape what they show, and refuse unknown names."""

from __future__ import annotations

import sys

import pytest

from microscale.errors import DependencyError
from microscale.report.page import page_template

jinja2 = pytest.importorskip("jinja2")


@pytest.mark.parametrize("name", ["analysis.html.j2", "comparison.html.j2", "study.html.j2"])
def test_templates_escape_and_refuse_unknown_names(name: str) -> None:
    template = page_template(name)
    with pytest.raises(jinja2.UndefinedError):
        template.render()
    assert template.environment.autoescape is True
    shown = template.environment.from_string("{{ word }}").render(word="<b>&'")
    assert shown == "&lt;b&gt;&amp;&#39;"


def test_jinja_is_named_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(DependencyError, match=r"the HTML report needs jinja2.*microscale\[report\]"):
        page_template("study.html.j2")
