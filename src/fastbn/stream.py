"""Statistics and normalization of .npy files that need not fit into memory.

Each block of the input is a memory map of its own that is dropped before the next one, because pages of one
map over the whole file would count as this process's memory until someone else needs it. The output is
written, not mapped: a full disk is then an error that can be reported, where a store to a mapped page would
kill the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks, state
from .errors import StateError, must
from .files import atomic_file
from .moments import Moments
from .normalization import normalize
from .npy import BLOCK_BYTES, Block, NpyFile
from .weights import NAN_POLICIES

__all__ = ["load_moments", "moments_of_file", "normalize_file", "same_file", "save_moments"]

Progress = Callable[[int], object]


def moments_of_file(
    path: str | os.PathLike[str],
    *,
    axis: int = -1,
    block_bytes: int = BLOCK_BYTES,
    progress: Progress | None = None,
) -> Moments:
    """Statistics of every channel of a .npy file, in constant memory.

    Parameters
    ----------
    path : path-like
        A .npy file of float32 or float64, in C or Fortran order.
    axis : int, default -1
        The channel axis.
    block_bytes : int
        The most that is read at once. Another value changes the result by rounding only.
    progress : callable, optional
        Called after each block with its number of bytes, as ``tqdm.update`` expects.

    Returns
    -------
    Moments
        Count, mean and M2 per channel; of count 0 for a file without values.

    Raises
    ------
    ValueError, TypeError, OSError
        As `NpyFile.open`; ValueError for an axis that the file does not have.
    """
    source = NpyFile.open(path)
    channel = source.channel_axis(axis)
    parts: dict[int, Moments] = {}
    with open(source.path, "rb") as file:
        for block in source.blocks(axis, block_bytes):
            values = source.read(file, block)
            part = parts.setdefault(block.channels.start, Moments(values.shape[channel]))
            part.update(values, axis=channel)
            nbytes = values.nbytes
            del values  # unmaps the block before the next one is mapped
            if progress is not None:
                progress(nbytes)
    if not parts:
        return Moments(source.memory_shape[channel])
    ordered = [parts[start] for start in sorted(parts)]
    return Moments.from_dict(
        {
            "count": ordered[0].count,
            "mean": np.concatenate([part.mean for part in ordered]),
            "m2": np.concatenate([part.m2 for part in ordered]),
        }
    )


def normalize_file(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    mean: ArrayLike,
    variance: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    epsilon: float = 1e-3,
    axis: int = -1,
    activation: str | tuple[str, float] | None = None,
    nan_policy: str = "propagate",
    block_bytes: int = BLOCK_BYTES,
    progress: Progress | None = None,
) -> None:
    """Normalize a .npy file into another one, in constant memory.

    ``y = (x - mean) / sqrt(variance + epsilon) * gamma + beta``, and its activation. The output has the shape, dtype
    and order of the input, in native byte order. It appears under its name when complete, or not at all.

    Parameters
    ----------
    path : path-like
        A .npy file of float32 or float64, in C or Fortran order.
    output : path-like
        The file to write or to replace; never the input.
    mean, variance : array-like of shape (C,)
        Statistics per channel.
    gamma, beta : array-like of shape (C,), optional
        Scale and offset; 1 and 0 if None.
    epsilon : float, default 1e-3
        Added to the variance.
    axis : int, default -1
        The channel axis.
    activation : str or tuple, optional
        As in `batch_norm`.
    nan_policy : {"propagate", "omit", "raise"}, default "propagate"
        "raise" refuses NaN; it stays NaN otherwise, as in `batch_norm` in inference.
    block_bytes : int
        The most that is read at once; the result does not depend on it.
    progress : callable, optional
        Called after each block with its number of bytes, as ``tqdm.update`` expects.

    Raises
    ------
    ValueError, TypeError, OSError
        As `NpyFile.open`; ValueError for an axis that the file does not have, for parameters of another
        number of channels, for an output that is the input, and for NaN that is refused.
    """
    source = NpyFile.open(path)
    if same_file(path, output):
        raise ValueError(f"output must differ from the input, got {output} for both")
    refuses = checks.one_of(nan_policy, "nan_policy", NAN_POLICIES) == "raise"
    channel = source.channel_axis(axis)
    count = source.memory_shape[channel]
    vectors = {"mean": mean, "variance": variance, "gamma": gamma, "beta": beta}
    arrays = {name: None if value is None else np.asarray(value) for name, value in vectors.items()}
    for name, array in arrays.items():
        if array is not None and array.shape != (count,):
            raise ValueError(f"{name} must have shape ({count},) for axis {axis} of {path}, got {array.shape}")
    dtype = source.dtype.newbyteorder("=")
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": source.fortran_order,
        "shape": source.shape,
    }
    with open(source.path, "rb") as file, atomic_file(output) as target:
        np.lib.format.write_array_header_1_0(target, header)
        scratch = np.empty(0, dtype)
        for block in source.blocks(axis, block_bytes):
            values = source.read(file, block)
            if refuses:
                _refuse_nan(source, block, values, channel)
            if scratch.size < values.size:  # the first block is the largest
                scratch = np.empty(values.size, dtype)
            result = scratch[: values.size].reshape(values.shape)
            part: dict[str, Any] = {n: None if a is None else a[block.channels] for n, a in arrays.items()}
            normalize(values, **part, epsilon=epsilon, axis=channel, activation=activation, out=result)
            del values  # unmaps the block before the next one is mapped
            target.write(result.data)
            if progress is not None:
                progress(result.nbytes)


def _refuse_nan(source: NpyFile, block: Block, values: NDArray[Any], channel: int) -> None:
    if np.isnan(values.min()):  # which needs no memory
        found = np.isnan(values).any(axis=tuple(a for a in range(values.ndim) if a != channel))
        where = f"some in channel {block.channels.start + int(np.argmax(found))}"
        raise ValueError(must(str(source.path), 'have no NaN with nan_policy="raise"', where))


def same_file(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Whether two paths name one file, links included, existing or not."""
    try:
        return os.path.samefile(first, second)
    except OSError:
        return os.path.realpath(first) == os.path.realpath(second)


def save_moments(path: str | os.PathLike[str], moments: Moments, axis: int | None) -> None:
    """Write statistics to a state file, atomically.

    Parameters
    ----------
    path : path-like
        The file to write; no extension is added.
    moments : Moments
    axis : int or None
        The channel axis of the data, the default of whoever applies them; None if there is no single one.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    arrays = {"mean": moments.mean, "m2": moments.m2}
    count: int | float | NDArray[Any] | None = moments.count
    if isinstance(count, np.ndarray):  # a file of one count is as it always was
        arrays["count"] = count
        count = None
    state.write_state(path, "moments", {"count": count, "axis": axis}, arrays)


def load_moments(path: str | os.PathLike[str]) -> tuple[Moments, int | None]:
    """Read what `save_moments` wrote.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    moments : Moments
    axis : int or None

    Raises
    ------
    StateError
        For a file that is damaged or something else.
    OSError
        For a file that cannot be opened.
    """
    header, arrays = state.read_state(
        path, "moments", required=("mean", "m2"), optional=("count",), fields=("count", "axis")
    )
    axis = header["axis"]
    if not (axis is None or type(axis) is int):
        raise StateError(f"{path}: axis must be an integer or null, got {axis!r}")
    try:  # NaN is sound: it is what data with NaN leave behind, and it stays within its channel
        if ("count" in arrays) == (header["count"] is not None):
            raise ValueError(f"count must be a number or an array, got {header['count']!r}")
        return Moments.from_dict({"count": header["count"], **arrays}), axis
    except (TypeError, ValueError) as error:
        raise StateError(f"{path}: {error}") from error
