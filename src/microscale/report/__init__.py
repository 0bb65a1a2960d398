"""What people look at: value grids in the terminal, explanations of formats, the HTML page of a comparison.

This room gets plain records and computes nothing. matplotlib and jinja2 are imported at use (extra ``report``).
"""

from microscale.report.grids import value_grid_text

__all__ = ["value_grid_text"]
