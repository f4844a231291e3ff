"""Every test here compares with a real framework: marked ``parity``, counted, and skipped where that is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity import frameworks

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.parity)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if frameworks.counted:
        terminalreporter.section("configurations that agreed with the real framework")
        for name, number in sorted(frameworks.counted.items()):
            terminalreporter.line(f"{number:6d}  {name}")
