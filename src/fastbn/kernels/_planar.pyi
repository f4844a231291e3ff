from typing import Any

from numpy.typing import NDArray

from ._plan import Plan

def run(
    plan: Plan,
    operation: int,
    u: NDArray[Any],
    v: NDArray[Any] | None,
    y: NDArray[Any] | None,
    gamma: NDArray[Any] | None,
    beta: NDArray[Any] | None,
    mean: NDArray[Any] | None,
    variance: NDArray[Any] | None,
    epsilon: float,
    first: NDArray[Any] | None,
    second: NDArray[Any] | None,
    threads: int,
    w: NDArray[Any] | None = None,
    bend: tuple[int, tuple[float, float, float]] | None = None,
    by_output: bool = False,
    kept: NDArray[Any] | None = None,
    counting: tuple[NDArray[Any] | None, tuple[int, ...], bool, NDArray[Any], bool] | None = None,
) -> bool: ...
def set_own_cache(size: int) -> int: ...

ENTRY: Any
