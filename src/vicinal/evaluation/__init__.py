"""Metrics per query, intervals, protocols and the report."""
