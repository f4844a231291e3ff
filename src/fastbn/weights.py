"""How much values count: what `mask`, `sample_weight` and `nan_policy` come to, and counts that differ by channel."""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import checks
from .errors import must

Array = NDArray[Any]
Count = int | float | Array

NAN_POLICIES: Final = ("propagate", "omit", "raise")
# Beyond these, sums of weights times values could leave the range of the data's type: the weights are scaled then.
_SMALL, _LARGE = 2.0**-40, 2.0**40
# Means are merged in float64, which has all whole numbers up to this one. Two such counts add up to an int64 as well.
_MOST: Final = 2**53


class Weights(NamedTuple):
    """How much every value of a batch counts in its statistics.

    Attributes
    ----------
    array : ndarray or None
        float64, float32, uint8 or bool, of x's shape, with stride 0 along axes on which it does not depend; None where
        all values count alike.
    omits : bool
        Whether NaN is missing.
    scale : float
        The power of two that `array` is to be multiplied by to have the weights that were given.
    whole : bool
        Whether sums of the weights are counts of values.
    checked : bool
        Whether all weights are known to be finite, not negative, and of a size that sums can take. Where they are not,
        the sums will tell (`kernels.run`), and `settled` is what to do then.
    """

    array: Array | None
    omits: bool
    scale: float = 1.0
    whole: bool = True
    checked: bool = True

    def counts(self, total: Array) -> Array:
        """Return sums of `array`, per channel, as int64 counts of values or as sums of the weights given."""
        return total.astype(np.int64) if self.whole else total * self.scale

    def settled(self, axes: tuple[int, ...]) -> Weights:
        """Return unchecked weights as checked ones: scaled, if they have to be; or raise."""
        assert self.array is not None
        array, scale = _checked(self.array, self.array.shape, axes)
        return Weights(array, self.omits, scale, False)

    def keep_apart(self, out: Array) -> None:
        """Refuse to write where the weights are, which are read in another order."""
        checks.apart(out, "out", **{"mask or sample_weight": self.array})

    def of(self, rows: slice) -> Weights:
        """Return the weights of some rows, the first axis of x."""
        return self if self.array is None else self._replace(array=self.array[rows])


def resolved(
    mask: Any,
    sample_weight: Any,
    nan_policy: Any,
    x: Array,
    axes: tuple[int, ...],
    *,
    later: bool = False,
    seen: bool = False,
) -> Weights | None:
    """Check weights of a batch; None where every value counts alike.

    Parameters
    ----------
    mask, sample_weight, nan_policy
        As in `batch_norm`. What nan_policy="raise" asks for is left to `fastbn.passes.refuse_nan`.
    x : ndarray
        Checked data.
    axes : tuple of ints
        Its channel axes.
    later : bool
        Whether weights per value, which are as many as x has values, are left unchecked: the sums will do that.
    seen : bool
        Whether all weights have been found right before, and of a size that needs no scaling.

    Returns
    -------
    Weights or None
        What both say together.

    Raises
    ------
    TypeError
        If a dtype does not fit, or nan_policy is no string.
    ValueError
        If a shape does not fit, a weight is negative or not finite, or nan_policy is unknown.
    """
    policy = checks.one_of(nan_policy, "nan_policy", NAN_POLICIES)
    omits = policy == "omit" and x.dtype.kind not in "iu"
    if mask is None and sample_weight is None:
        return Weights(None, True) if omits else None
    kept = None if mask is None else spread(_mask(mask), "mask", x.shape, axes)
    if sample_weight is None:
        assert kept is not None
        return Weights(np.broadcast_to(kept, x.shape), omits)
    weights = spread(_weights(sample_weight), "sample_weight", x.shape, axes)
    if later and kept is None and weights.size == x.size and weights.dtype.kind == "f":
        return Weights(weights, omits, 1.0, False, False)
    weights, scale = (weights, 1.0) if seen else _checked(weights, x.shape, axes)
    if kept is not None:
        weights = np.where(kept, weights, weights.dtype.type(0))
    return Weights(np.broadcast_to(weights, x.shape), omits, scale, False)


def given(mask: Any, sample_weight: Any) -> dict[str, Array]:
    """Return checked weights as arrays by the names they were given under."""
    named = {"mask": mask, "sample_weight": sample_weight}
    return {name: checks.as_array(value, name) for name, value in named.items() if value is not None}


def _mask(value: Any) -> Array:
    array = checks.as_array(value, "mask")
    if array.dtype != np.bool_:
        raise TypeError(must("mask", "have dtype bool", array.dtype))
    return array


def _weights(value: Any) -> Array:
    """Return weights in a type that kernels know."""
    array = checks.as_array(value, "sample_weight")
    if array.dtype.char in "fd" and array.dtype.isnative and array.flags.aligned:
        return array
    kind, size = array.dtype.kind, array.dtype.itemsize
    half = array.dtype.name == "bfloat16" or (kind == "f" and size == 2)
    if not half and (kind not in "biuf" or size > 8):
        raise TypeError(must("sample_weight", "have a bool, integer or real dtype of at most 64 bits", array.dtype))
    if kind == "b" or array.dtype == np.uint8:
        return array
    exact = half or (kind in "iu" and size <= 2) or (kind == "f" and size == 4)  # in float32
    return np.require(array, np.float32 if exact else np.float64, "A")


def _checked(array: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[Array, float]:
    """Return weights that are finite and not negative, scaled, and the power of two they were divided by; or raise.

    They are for data of that shape and channel axes, and are 1 long where they say nothing.
    """
    if not array.size or array.dtype.kind != "f":
        return array, 1.0
    low, high = _range(array)
    if not (low >= 0 and high < math.inf):
        raise ValueError(must("sample_weight", "be finite and not negative", high if low >= 0 else low))
    if high == 0 or _SMALL <= high <= _LARGE:
        return array, 1.0
    exponent = math.frexp(high)[1] - 1
    scaled, scale = np.ldexp(array.astype(np.float64), -exponent), math.ldexp(1.0, exponent)
    others = [a for a in range(len(shape)) if a not in axes]
    if math.isinf(high * math.prod(shape[a] for a in others)):
        each = math.prod(shape[a] // array.shape[a] for a in others)
        if math.isinf(float(scaled.sum(axis=tuple(others)).max()) * each * scale):
            raise ValueError(must("sample_weight", "have a finite sum", f"weights of up to {high}"))
    return scaled, scale


def _range(array: Array) -> tuple[float, float]:
    """Return bounds of float32 or float64 values; the lower one is 0 where none is negative."""
    if array.flags.c_contiguous:  # bits of numbers that are not negative are in order: one pass, not two
        high = array.view(f"u{array.itemsize}").max()[None].view(array.dtype)[0]
        if 0 <= high < math.inf and not np.signbit(high):
            return 0.0, float(high)
    return float(array.min()), float(array.max())


def spread(array: Array, name: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Return an array per sample, position or value with as many axes as x has, 1 long where it says nothing."""
    positions = tuple(1 if a in axes else n for a, n in enumerate(shape))
    allowed = {shape: shape, positions: positions, tuple(n for a, n in enumerate(shape) if a not in axes): positions}
    if len(shape) > 1 and 0 not in axes:
        allowed[shape[:1]] = (shape[0], *(1 for _ in shape[1:]))
    if array.shape not in allowed:
        per_sample = f"{shape[:1]} per sample, " if len(shape) > 1 and 0 not in axes else ""
        short = tuple(n for a, n in enumerate(shape) if a not in axes)
        words = f"have shape {per_sample}{short} or {positions} per position, or {shape} per value"
        raise ValueError(must(name, words, array.shape))
    return array.reshape(allowed[array.shape])


# -- counts ----------------------------------------------------------------------------------------------------------


def tidy(count: Count) -> Count:
    """Return one number for counts that are the same in all channels."""
    if isinstance(count, np.ndarray) and (not count.size or (count == count[0]).all()):
        return count[0].item() if count.size else 0
    return count


def per_channel(count: Count, channels: int) -> Array:
    """Return counts as a contiguous float64 array."""
    return np.array(np.broadcast_to(count, (channels,)), np.float64)


def described(count: Count) -> str:
    """Return a count in words."""
    if isinstance(count, np.ndarray):
        low, high = count.min(), count.max()
        return f"{low} to {high} values each" if count.dtype.kind == "i" else f"weights of {low:.7g} to {high:.7g}"
    return f"{count} values each" if isinstance(count, int) else f"weights of {count:.7g}"


def added(count: Count, other: Count) -> Count:
    """Return the count of both."""
    return tidy(_bounded(count + other, "the sum of counts"))


def _bounded(count: Count, name: str) -> Count:
    """Return whole numbers that float64 has, or sums of weights; or raise."""
    if isinstance(count, np.ndarray):
        more = count.dtype.kind in "iu" and bool((count > _MOST).any())
    else:
        more = isinstance(count, int) and count > _MOST
    if more:
        raise ValueError(must(name, "be at most 2**53", "more"))
    return count


def checked_count(value: Any, channels: int, name: str = "count") -> Count:
    """Return a count of values, a sum of weights, or an array of either per channel."""
    if not isinstance(value, np.ndarray | list | tuple):
        if isinstance(value, float | np.floating):
            return checks.real(float(value), name, 0.0, math.inf, "finite and at least 0")
        return _bounded(checks.count(value, name), name)
    array = checks.as_array(value, name)
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise TypeError(must(name, "be integers or real numbers", array.dtype))
    if array.shape != (channels,):
        raise ValueError(must(name, f"have shape {(channels,)}", array.shape))
    _bounded(array, name)  # before it is int64, which has no place for all uint64
    array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
    if not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(must(name, "be finite and at least 0", array.min()))
    return tidy(array)
