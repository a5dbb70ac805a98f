"""The library benchmark runs and reports in the common format."""

from __future__ import annotations

import pytest

from tests.benchmarks.runs import report_of


@pytest.mark.slow
def test_a_small_run_reports_rows_and_bars() -> None:
    result = report_of("library.py", "--quick", "--adapters", "500")
    assert result["machine"]["adapters"] == 500
    assert len(result["bars"]) >= 10
