"""The compiled kernels, and the level of them that this process uses."""

from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from . import _interleaved_base, _planar_base
from ._plan import OPERATIONS, Plan

Array = NDArray[Any]

LEVELS = ("base",)
LEVEL = "base"
_DRIVERS: tuple[ModuleType, ModuleType] = (_planar_base, _interleaved_base)
_RUN = tuple(driver.run for driver in _DRIVERS)

MOMENTS = OPERATIONS["moments"]
NORMALIZE = OPERATIONS["normalize"]
TRAIN = OPERATIONS["train"]
GRADIENT = OPERATIONS["gradient"]
FROZEN = OPERATIONS["frozen"]


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
) -> None:
    """Carry out a plan with the driver of its pattern; see `_planar.run`."""
    _RUN[plan.pattern](
        plan, operation, u, v, y, gamma, beta, mean, variance, epsilon, first, second, threads
    )
