"""Warnings and errors of fastbn's own, and the form of messages: what the argument is, must be, and was."""

from __future__ import annotations

import sys
import warnings

__all__ = ["PendingUpdatesWarning", "StateError", "UntrainedWarning", "must", "warn"]


class UntrainedWarning(UserWarning):
    """Inference normalized with moving statistics that no batch ever reached."""


class PendingUpdatesWarning(UserWarning):
    """Inference followed training whose updates of the moving statistics were deferred and never applied."""


class StateError(ValueError):
    """A state file or dictionary is damaged, foreign, or does not fit."""


def must(name: str, requirement: str, got: object) -> str:
    """Return the message for an argument that is not what it must be."""
    return f"{name} must {requirement}, got {got}"


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line that called the library, however deep the call went in it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fastbn."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
