"""`report.html`: one file for the person who decides."""

from surgery.lab.report.html.comparison import write_comparison
from surgery.lab.report.html.report import REPORT, write_report

__all__ = ["REPORT", "write_comparison", "write_report"]
