"""The report: one HTML file that holds its pictures, its plots and its script.

It says what the measurements say.  An unsafe rate never stands without its number of samples,
its interval, the utility and the over-refusal of the same defense.
"""

from tasks.report.comparison import Comparison
from tasks.report.render import render_report

__all__ = ["Comparison", "render_report"]
