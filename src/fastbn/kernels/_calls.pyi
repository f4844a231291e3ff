from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

def connect(planar: Any, interleaved: Any) -> None: ...
def forward(
    x: Any,
    gamma: Any,
    beta: Any,
    moving_mean: Any,
    moving_variance: Any,
    training: Any,
    momentum: Any,
    epsilon: Any,
    axis: Any,
    ddof: Any,
    update: Any,
    out: Any,
    keep: bool,
    in_place: bool,
    threads: Callable[[int], int],
    serial: int,
    mask: Any = None,
    sample_weight: Any = None,
    nan_policy: Any = "propagate",
    bent: Any = None,
    residual: Any = None,
    layer: Any = None,
) -> Any: ...
def backward(
    dy: Any,
    x: NDArray[Any],
    axis: int,
    gamma: NDArray[Any] | None,
    mean: NDArray[Any],
    variance: NDArray[Any],
    epsilon: float,
    frozen: bool,
    out: Any,
    threads: Callable[[int], int],
    serial: int,
    counting: tuple[NDArray[Any] | None, tuple[int, ...], bool, NDArray[Any], bool] | None = None,
    bent: Any = None,
    has_residual: bool = False,
    beta: NDArray[Any] | None = None,
    residual: NDArray[Any] | None = None,
    y: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], ...] | None: ...
