"""Any array is (outer, channels, inner).

An axis, or a layout's name, says which axis holds the channels; the strides say in which order the others lie in
memory. Axes that lie outside the channels are walked as one, axes inside them as another, and no copy is made where the
strides allow that. The order comes from the sizes of the strides alone, never from their signs or from gaps, so that a
sliced or reversed array is walked exactly like its contiguous copy, and gives the same bits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import must
from .kernels import KINDS, Plan, _memory

# name -> (channel axis, number of dimensions or None for any)
LAYOUTS: Final[dict[str, tuple[int, int | None]]] = {
    "NC": (1, 2),
    "NCL": (1, 3),
    "NLC": (2, 3),
    "NCHW": (1, 4),
    "NHWC": (3, 4),
    "NCDHW": (1, 5),
    "NDHWC": (4, 5),
    "channels_first": (1, None),
    "channels_last": (-1, None),
}

Axis = int | tuple[int, ...]
Strides = tuple[int, ...]
Triple = tuple[int, int, int]

# Bytes of a value of x, and of the other operands of its call, by kind.
_SIZES: Final[dict[int, tuple[int, int]]] = {
    KINDS["float32"]: (4, 4),
    KINDS["float64"]: (8, 8),
    KINDS["float16"]: (2, 2),
    KINDS["bfloat16"]: (2, 2),
    KINDS["uint8"]: (1, 4),
    KINDS["int8"]: (1, 4),
}


def channel_axes(axis: Any, layout: str | None, ndim: int, name: str = "x") -> tuple[int, ...]:
    """Return the channel axes of an array, not negative, in the order given.

    Parameters
    ----------
    axis : int or tuple of ints
        As the user gave it; -1, the default of every function, also stands for "not given" beside a layout.
    layout : str or None
        A name of `LAYOUTS`.
    ndim : int
        Number of dimensions of the array.
    name : str
        Of the array, for messages.

    Returns
    -------
    tuple of ints
        The axes.

    Raises
    ------
    TypeError
        If axis is not made of integers or layout is not a string.
    ValueError
        If an axis is out of range or occurs twice, the layout is unknown or of another rank, or both disagree.
    """
    if ndim == 0:
        raise ValueError(must(name, "have at least 1 dimension", "a scalar"))
    axes = _normalized(_plain(axis), ndim)
    if layout is None:
        return axes
    named, rank = _named(layout)
    if rank is not None and ndim != rank:
        raise ValueError(must(name, f"have {rank} dimensions with layout {layout!r}", ndim))
    if named >= ndim:
        raise ValueError(must(name, f"have at least {named + 1} dimensions with layout {layout!r}", ndim))
    channels = (named % ndim,)
    if axes != channels and axis != -1:
        raise ValueError(must("axis", f"agree with layout {layout!r}, whose channel axis is {named}", repr(axis)))
    return channels


def plain_axis(axis: Any, layout: Any, x: Any) -> Any:
    """Return the axis that a layout's name plainly stands for, the axis itself without a layout, and otherwise None.

    Nothing is checked: None, or whatever else is not an axis of x, is for `channel_axes` to look at.
    """
    if layout is None:
        return axis
    named = LAYOUTS.get(layout) if type(layout) is str else None
    if named is None or type(axis) is not int or axis != -1 or named[1] not in (None, getattr(x, "ndim", None)):
        return None
    return named[0]


def checked_axis(axis: Any, layout: str | None) -> int | tuple[int, ...]:
    """Return an axis as plain ints, checked as far as that goes without an array."""
    plain = _plain(axis)
    if layout is not None:
        _named(layout)
    return plain


def _named(layout: Any) -> tuple[int, int | None]:
    if not isinstance(layout, str):
        raise TypeError(must("layout", "be a string or None", repr(layout)))
    if layout not in LAYOUTS:
        raise ValueError(must("layout", "be one of " + ", ".join(LAYOUTS), repr(layout)))
    return LAYOUTS[layout]


def _plain(axis: Any) -> Axis:
    if type(axis) is int:
        return axis
    try:
        if isinstance(axis, tuple | list):
            return tuple(_index(a) for a in axis)
        return _index(axis)
    except TypeError:
        raise TypeError(must("axis", "be an int or a tuple of ints", repr(axis))) from None


def _index(value: Any) -> int:
    if isinstance(value, bool | np.bool_):
        raise TypeError
    return operator.index(value)


@lru_cache(maxsize=256)
def _normalized(axis: Axis, ndim: int) -> tuple[int, ...]:
    given = axis if isinstance(axis, tuple) else (axis,)
    if not given:
        raise ValueError(must("axis", "name at least one axis", repr(axis)))
    axes = []
    for value in given:
        if not -ndim <= value < ndim:
            raise ValueError(must("axis", f"be in {-ndim} to {ndim - 1} for {ndim} dimensions", repr(axis)))
        axes.append(value % ndim)
    if len(set(axes)) != len(axes):
        raise ValueError(must("axis", "name each axis once", repr(axis)))
    return tuple(axes)


def _memory_order(shape: Sequence[int], strides: Sequence[int], axes: tuple[int, ...]) -> list[int]:
    """Return axes from the outermost in memory to the innermost; the channel axes stand together, at the last's place.

    An axis of one index, or of stride 0, has no place in memory of its own: it stays where it is written.
    """
    order: list[int] = []
    for axis in range(len(shape)):
        if axis in axes[:-1]:
            continue
        at = len(order)
        for i in range(len(order) - 1, -1, -1):
            other = order[i]
            if 1 in (shape[axis], shape[other]) or 0 in (strides[axis], strides[other]):
                continue
            if abs(strides[other]) >= abs(strides[axis]):
                break
            at = i
        order.insert(at, axis)
    at = order.index(axes[-1])
    order[at:at] = axes[:-1]
    return order


def _collapsed(shape: Sequence[int], strides: Sequence[int], axes: Sequence[int]) -> tuple[int, int] | None:
    """Return (extent, stride) of several axes walked as one, or None where no single stride walks them."""
    extent, stride, reach = 1, 0, 0
    for axis in reversed(axes):
        if shape[axis] == 1:
            continue
        if extent == 1:
            stride = reach = strides[axis]
        elif strides[axis] != reach:
            return None
        extent *= shape[axis]
        reach *= shape[axis]
    return extent, stride


def _canonical(
    shape: Sequence[int], strides: Strides, order: Sequence[int], axes: tuple[int, ...], itemsize: int
) -> tuple[Triple, Triple] | None:
    """Return ((outer, channels, inner), their strides in values), or None where a copy is needed."""
    at = order.index(axes[0])
    parts = (order[:at], axes, order[at + len(axes) :])
    triples = [_collapsed(shape, strides, part) for part in parts]
    if any(t is None or t[1] % itemsize for t in triples):
        return None
    (n, sn), (c, sc), (s, ss) = triples  # type: ignore[misc]
    return (n, c, s), (sn // itemsize, sc // itemsize, ss // itemsize)


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    kind: int,
    x: Strides,
    dy: Strides | None,
    y: Strides | None,
    residual: Strides | None = None,
    kept: Strides | None = None,
) -> Plan | None:
    """Return the plan of a call on arrays of one shape, or None where the strides of one of them need a copy.

    Parameters
    ----------
    shape : tuple of ints
        Shape of x, without zeros.
    axes : tuple of ints
        Channel axes.
    kind : int
        Type of x, by `checks.kind`; that of the others follows.
    x, dy, y, residual, kept : tuple of ints or None
        Strides in bytes of x, of the gradient that comes in, of the result, of what is added to it and of the gradient
        before an activation. The order of x decides.

    Returns
    -------
    Plan or None
        For drivers: dy is the first operand and x the second where dy is given.
    """
    size, other = _SIZES[kind]
    order = _memory_order(shape, x, axes)
    sized = ((x, size), (dy, other), (y, other), (residual, other), (kept, other))
    forms = [None if s is None else _canonical(shape, s, order, axes, itemsize) for s, itemsize in sized]
    if any(s is not None and f is None for (s, _), f in zip(sized, forms)):
        return None
    form_x, form_dy, *others = forms
    assert form_x is not None
    first, second = (form_x[1], None) if form_dy is None else (form_dy[1], form_x[1])
    return Plan(form_x[0], kind, first, second, *(None if form is None else form[1] for form in others))


@lru_cache(maxsize=4096)
def weights_form(
    shape: tuple[int, ...], axes: tuple[int, ...], x: Strides, weights: Strides
) -> tuple[int, int, int, int, int] | None:
    """Return how weights are walked beside x, or None where they need a copy.

    Parameters
    ----------
    shape, axes, x
        Shape, channel axes and strides in bytes of x, whose order decides.
    weights : tuple of ints
        Strides of the weights; 0 along an axis on which they do not depend.

    Returns
    -------
    tuple of ints or None
        (repeat, major, minor, channel, inner): the outer index i lies i // repeat times major and i % repeat times
        minor bytes from the start. So the weights of images need not be repeated for the positions in them.
    """
    order = _memory_order(shape, x, axes)
    at = order.index(axes[0])
    outer = order[:at]
    others = [_collapsed(shape, weights, part) for part in (axes, order[at + len(axes) :])]
    if any(form is None for form in others):
        return None
    (_, channel), (_, inner) = others  # type: ignore[misc]
    for cut in range(at + 1):
        major, minor = _collapsed(shape, weights, outer[:cut]), _collapsed(shape, weights, outer[cut:])
        if major is not None and minor is not None:
            return minor[0], major[1], minor[1], channel, inner
    return None


def packed_weights(weights: NDArray[Any], x: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
    """Return a copy of weights that `weights_form` has a form of, one per position if channels have the same."""
    order = _memory_order(x.shape, x.strides, axes)
    moved = weights.transpose(order)
    at = order.index(axes[0])
    if all(weights.strides[a] == 0 or x.shape[a] == 1 for a in axes):
        moved = moved[(slice(None),) * at + (slice(0, 1),) * len(axes)]
    copy = np.broadcast_to(np.ascontiguousarray(moved), [x.shape[a] for a in order])
    return copy.transpose(np.argsort(order))


def packed(x: NDArray[Any], axes: tuple[int, ...]) -> NDArray[Any]:
    """Return x in memory that has a plan, in the order in which that would walk x; a copy if it is not."""
    order = _memory_order(x.shape, x.strides, axes)
    return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))


def like(x: NDArray[Any], dtype: np.dtype[Any] | None = None) -> NDArray[Any]:
    """Return an uninitialized array of x's shape and order of axes in memory, and of its type if none is given."""
    return _memory.empty_like(x, dtype)


def channel_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that parameters and statistics have."""
    return tuple(shape[a] for a in axes)


def values_per_channel(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """Return how many values a channel has."""
    return math.prod(n for a, n in enumerate(shape) if a not in axes)
