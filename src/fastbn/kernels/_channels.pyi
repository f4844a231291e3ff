from collections.abc import Iterable
from typing import Any

from numpy.typing import NDArray

def put(pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]], counts: Iterable[tuple[Any, int]] = ()) -> None: ...
def update_moving(
    moving_mean: NDArray[Any],
    moving_variance: NDArray[Any],
    mean: NDArray[Any],
    variance: NDArray[Any],
    divisor: float,
    momentum: float,
) -> None: ...
def update_moving_counted(
    moving_mean: NDArray[Any],
    moving_variance: NDArray[Any],
    mean: NDArray[Any],
    variance: NDArray[Any],
    counts: NDArray[Any],
    ddof: float,
    momentum: float,
) -> None: ...
def parameter_gradients(
    first: NDArray[Any],
    second: NDArray[Any],
    variance: NDArray[Any],
    epsilon: float,
    dgamma: NDArray[Any],
    dbeta: NDArray[Any],
) -> None: ...
def output_parameters(
    gamma: NDArray[Any] | None, beta: NDArray[Any] | None, variance: NDArray[Any], epsilon: float
) -> NDArray[Any]: ...
def variance(m2: NDArray[Any], count: float) -> NDArray[Any]: ...
def merge_moments(
    count: float,
    mean: NDArray[Any],
    m2: NDArray[Any],
    other_count: float,
    other_mean: NDArray[Any],
    other_m2: NDArray[Any],
) -> None: ...
def merge_rows(rows: NDArray[Any]) -> NDArray[Any]: ...
def add_rows(rows: NDArray[Any]) -> NDArray[Any]: ...
def variance_counted(m2: NDArray[Any], counts: NDArray[Any], ddof: float, without: float) -> NDArray[Any]: ...
def merge_moments_counted(
    counts: NDArray[Any],
    mean: NDArray[Any],
    m2: NDArray[Any],
    other_counts: NDArray[Any],
    other_mean: NDArray[Any],
    other_m2: NDArray[Any],
) -> None: ...
