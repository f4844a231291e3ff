"""Which frameworks are there, how many configurations are compared, and how many were.

Environment variables:

FASTBN_PARITY_EXAMPLES
    Configurations per test, 25 by default; `make parity` asks for 500.
FASTBN_PARITY_REQUIRE
    Names of packages, with commas: where one of them is missing its tests fail instead of being skipped.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

EXAMPLES = int(os.environ.get("FASTBN_PARITY_EXAMPLES", "25"))
_REQUIRED = [name for name in os.environ.get("FASTBN_PARITY_REQUIRE", "").split(",") if name]

# Runs of the bodies of the tests that went to their end, by test.
counted: Counter[str] = Counter()

# For each test: `@frameworks.configurations` below `@given(...)` or above it.
configurations = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    database=None,
    phases=[Phase.explicit, Phase.generate],  # a seed has no simpler one: shrinking would only take time
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


def agreed(what: str) -> None:
    """Count a configuration, at the end of a test's body."""
    counted[what] += 1


def load(module: str, install: str) -> Any:
    """Return a framework's module; without it the tests of the file are skipped, or fail where it is required."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        reason = f"{package} is not installed: {install}, or make parity"
        if package in _REQUIRED:
            pytest.fail(f"FASTBN_PARITY_REQUIRE names {package}, which cannot be imported: {error}", pytrace=False)
        pytest.skip(reason, allow_module_level=True)
