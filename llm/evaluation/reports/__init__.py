"""The page that a person looks at first: `report.html` in a run directory, complete in one file."""

from llm.evaluation.reports.page import write_report
from llm.evaluation.reports.run_record import read_run, update_summary

__all__ = ['read_run', 'update_summary', 'write_report']
