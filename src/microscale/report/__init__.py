"""What people look at: value grids in the terminal, explanations of formats, the HTML page of a comparison.

This room gets plain records and computes nothing. matplotlib and jinja2 are imported at use (extra ``report``).
"""

from microscale.report.allocation import allocation_plot, check_picture
from microscale.report.analysis import Advice, AnalysisRow, HeatRow, analysis_html
from microscale.report.analysis_pictures import ChannelPicture, HistogramPicture
from microscale.report.comparison import DIFFERENCE, ComparisonRow, comparison_cells, comparison_html, size_text
from microscale.report.explain import FormatRow, explain_format, formats_table_rows
from microscale.report.grids import value_grid_text
from microscale.report.study import study_html
from microscale.report.study_rows import StudyCell, StudyReportRow

__all__ = [
    "DIFFERENCE",
    "Advice",
    "AnalysisRow",
    "ChannelPicture",
    "ComparisonRow",
    "FormatRow",
    "HeatRow",
    "HistogramPicture",
    "StudyCell",
    "StudyReportRow",
    "allocation_plot",
    "analysis_html",
    "check_picture",
    "comparison_cells",
    "comparison_html",
    "explain_format",
    "formats_table_rows",
    "size_text",
    "study_html",
    "value_grid_text",
]
