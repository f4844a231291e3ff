"""Warnings and errors of fastbn's own, and the form of messages: what the argument is, must be, and was."""

from __future__ import annotations

__all__ = ["PendingUpdatesWarning", "StateError", "UntrainedWarning", "must"]


class UntrainedWarning(UserWarning):
    """Inference normalized with moving statistics that no batch ever reached."""


class PendingUpdatesWarning(UserWarning):
    """Inference followed training whose updates of the moving statistics were deferred and never applied."""


class StateError(ValueError):
    """A state file or dictionary is damaged, foreign, or does not fit."""


def must(name: str, requirement: str, got: object) -> str:
    """Return the message for an argument that is not what it must be."""
    return f"{name} must {requirement}, got {got}"
