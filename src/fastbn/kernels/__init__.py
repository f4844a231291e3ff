"""The compiled kernels, at the level that this process uses."""

from typing import Any

from numpy.typing import NDArray

from . import _calls, dispatch
from ._plan import BENDS, KINDS, OPERATIONS, Plan

Array = NDArray[Any]

__all__ = ["BENDS", "FROZEN", "GRADIENT", "KINDS", "MOMENTS", "NORMALIZE", "POOLED", "TRAIN", "Plan", "run"]

MOMENTS = OPERATIONS["moments"]
NORMALIZE = OPERATIONS["normalize"]
TRAIN = OPERATIONS["train"]
GRADIENT = OPERATIONS["gradient"]
FROZEN = OPERATIONS["frozen"]
POOLED = OPERATIONS["pooled"]

_drivers = dispatch.drivers(dispatch.level)
_run = tuple(driver.run for driver in _drivers)
_calls.connect(*(driver.ENTRY for driver in _drivers))


def run(
    plan: Plan,
    operation: int,
    u: Array,
    v: Array | None,
    y: Array | None,
    gamma: Array | None,
    beta: Array | None,
    mean: Array | None,
    variance: Array | None,
    epsilon: float,
    first: Array | None,
    second: Array | None,
    threads: int,
    w: Array | None = None,
    bend: tuple[int, tuple[float, float, float]] | None = None,
    by_output: bool = False,
    kept: Array | None = None,
    counting: tuple[Array | None, tuple[int, ...], bool, Array, bool] | None = None,
) -> bool:
    """Carry out a plan with the driver of its pattern.

    Parameters
    ----------
    plan : Plan
        What to do; see `fastbn.layout.plan`.
    operation : int
        `MOMENTS`, `NORMALIZE`, `TRAIN`, `GRADIENT`, `FROZEN` or `POOLED`.
    u, v, y : ndarray or None
        x, None and the result; in a gradient dy, x and dx.
    gamma, beta, mean, variance : one-dimensional ndarray or None
        Parameters, float32 or float64 of any stride.
    epsilon : float
        Added to the variance.
    first, second : contiguous ndarray of float64, or None
        Results per channel: mean and sum of squared deviations; in a gradient sum(dy) and sum(dy * (x - mean)).
        `POOLED` reads them instead: those sums, over the count.
    threads : int
        Size of the team.
    w : ndarray or None
        The residual; in a gradient with `by_output` y.
    bend : tuple or None
        The activation: one of `BENDS`, and its three numbers; see lanes.pxd.
    by_output : bool
        Whether a gradient tells the activation's derivative from y, else from x, the parameters and the residual.
    kept : ndarray or None
        Where a gradient also writes dy times that derivative.
    counting : tuple or None
        Where values do not all count alike: weights (float64, float32, uint8, bool or None) of x's shape, their extents
        and strides, whether NaN is missing, the sum of weights per channel, a contiguous ndarray of float64 that sums
        of x are a result for and gradients read, and whether the weights are unchecked; see `bind_weights` in
        _plan.pyx.

    Returns
    -------
    bool
        True; False where unchecked weights turned out not to fit, being negative, not finite, or too large or small.
        Nothing but first, second and total has been written then.
    """
    done: bool = _run[plan.pattern](
        plan, operation, u, v, y, gamma, beta, mean, variance, epsilon, first, second, threads, w, bend, by_output,
        kept, counting,
    )  # fmt: skip
    return done
