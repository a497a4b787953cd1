"""The page on prepared documents: why each of them went, in one file that needs nothing besides."""

from llm.evaluation.reports.prepared_data.page import PAGE_FILE, REPORT_FILE, printed_rules, write_data_report

__all__ = ['PAGE_FILE', 'REPORT_FILE', 'printed_rules', 'write_data_report']
