"""The two mistakes of TensorFlow 1's users: statistics that nothing reached, and updates that nobody ran."""

from __future__ import annotations

from ..errors import PendingUpdatesWarning, UntrainedWarning, warn
from ._graph import Update, Variable


def at_inference(moving_mean: Variable, moving_variance: Variable) -> None:
    """Warn where a call normalizes with moving statistics that are not what the user takes them for."""
    waiting = [variable for variable in (moving_mean, moving_variance) if _waited_for(variable)]
    if waiting:
        new = [variable for variable in waiting if not variable._warned]
        for variable in new:
            variable._warned = True
        if new:
            warn(
                f"{new[0].name} is used, and {len(new[0]._pending)} updates of it wait in a collection. Carry them out "
                'after each training call: `for update in get_collection("update_ops"): update()`.',
                PendingUpdatesWarning,
            )
    elif (
        not moving_mean._warned
        and not moving_mean._pending
        and not moving_mean._written
        and _untouched(moving_mean, moving_variance)
    ):
        moving_mean._warned = True
        warn(
            f"{moving_mean.name} and {moving_variance.name} are used, which no batch has reached: mean 0, variance 1. "
            "Call with training=True first, with the same variables, or restore them.",
            UntrainedWarning,
        )


def repeated(update: Update) -> None:
    """Warn where an update that was carried out is called again while newer ones wait."""
    waiting = len(update.variable._pending)
    if waiting:
        warn(
            f"{update.name} was carried out before, and {waiting} newer updates of {update.variable.name} wait. Ask "
            'get_collection("update_ops") again after each training call.',
            PendingUpdatesWarning,
        )


def _waited_for(variable: Variable) -> bool:
    """Say whether updates were left; one may wait after others have run, of a training step that is not over."""
    pending = len(variable._pending)
    return pending > 1 or (pending == 1 and not variable._written)


def _untouched(mean: Variable, variance: Variable) -> bool:
    return bool(mean.value.size) and not mean.value.any() and bool((variance.value == 1).all())
