"""What was left out, by reason, and whether it had to be."""

from __future__ import annotations

from collections import Counter

import pytest


class SkipReport:
    """Counts skips; one whose cause is absent turns a green run into a failure.

    available: prefix of the reason (``data:``) -> True when what it asks for is there, so
    that nothing may be skipped for it.
    """

    def __init__(self, available: dict[str, bool]) -> None:
        self.available = available
        self.reasons: Counter[str] = Counter()

    def unjustified(self) -> list[str]:
        """Reasons that do not hold here."""
        return [reason for reason in self.reasons
                if any(reason.startswith(prefix) and there
                       for prefix, there in self.available.items())]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one report (an expected failure is not a skip)."""
        if report.skipped and not hasattr(report, 'wasxfail'):
            self.reasons[str(report.longrepr[2]).removeprefix('Skipped: ')] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a module that skips itself as a whole."""
        if report.skipped:
            self.reasons[str(report.longrepr[2]).removeprefix('Skipped: ')] += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail the run for skips without a cause."""
        if self.unjustified() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Reasons with their counts, the unjustified ones marked."""
        if not self.reasons:
            return
        terminalreporter.section('skipped')
        unjustified = self.unjustified()
        for reason, count in sorted(self.reasons.items()):
            mark = '  <- FAILURE: what it needs is there' if reason in unjustified else ''
            terminalreporter.line(f'{count:4d}  {reason}{mark}')
