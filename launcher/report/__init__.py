"""The report of a run: what was planned, what happened, and what it did to the perplexity."""

from launcher.report.page import write_report
from launcher.report.totals import summary

__all__ = ["summary", "write_report"]
