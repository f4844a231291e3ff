"""What every public function asks of its arguments, one function per concern. All of it comes before any write."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import must
from .kernels import KINDS

Array = NDArray[Any]

_DATA_TYPES: Final = frozenset({np.dtype(np.float32), np.dtype(np.float64)})
_DATA_TYPES_SWAPPED: Final = frozenset(np.dtype(t).newbyteorder() for t in (np.float16, np.float32, np.float64))
# Types of x. NumPy has no bfloat16 of its own: that of ml_dtypes is known by its name, and joins when it is first seen.
_KINDS: Final = {np.dtype(name): kind for name, kind in KINDS.items() if name != "bfloat16"}
# bfloat16 by its bits, for frameworks that have the type where NumPy has none: `fastbn.torch`.
BFLOAT16_BITS: Final = np.dtype([("bfloat16", np.uint16)])
_KINDS[BFLOAT16_BITS] = KINDS["bfloat16"]
_RESULTS: Final = {np.dtype(t): np.dtype(np.float32) for t in (np.uint8, np.int8)}
_DLPACK_CPU: Final = 1
_NOT_REAL: Final = (bool, np.bool_, str, bytes, np.complexfloating, np.timedelta64)  # of what float() takes


def as_array(value: Any, name: str) -> Array:
    """Return value as an ndarray without a copy where it is, or exports, an array in main memory."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(must(name, "be an array without a mask", "a numpy masked array"))
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if hasattr(value, "__dlpack__") and not isinstance(value, np.generic):
        device = value.__dlpack_device__() if hasattr(value, "__dlpack_device__") else (_DLPACK_CPU, 0)
        if int(device[0]) != _DLPACK_CPU:
            raise TypeError(must(name, "be in main memory", f"an array on DLPack device {tuple(map(int, device))}"))
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                must(name, "be convertible to a NumPy array", f"{type(value).__name__}: {error}")
            ) from error
    try:
        return np.asarray(value)
    except ValueError as error:
        raise TypeError(must(name, "be convertible to a NumPy array", f"{type(value).__name__}: {error}")) from error


def _known(dtype: np.dtype[Any]) -> bool:
    """Whether data may be of a dtype."""
    if dtype in _KINDS:
        return True
    if dtype.itemsize == 2 and dtype.isnative and dtype.name == "bfloat16":
        _KINDS[dtype] = KINDS["bfloat16"]
        return True
    return False


def kind(dtype: np.dtype[Any]) -> int:
    """Return what plans call the type of checked data."""
    return _KINDS[dtype]


def result_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type of y, dy and dx for a type of x."""
    return _RESULTS.get(dtype, dtype)


def parameter_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type of parameters and their gradients for a type of x."""
    return dtype if dtype.itemsize == 8 else np.dtype(np.float32)


def data(value: Any, name: str) -> Array:
    """Return the data of a batch: of a type that kernels know, native and aligned (copied once if not)."""
    array = as_array(value, name)
    if not _known(array.dtype):
        if array.dtype in _DATA_TYPES_SWAPPED:
            return array.astype(array.dtype.newbyteorder("="), order="K")
        raise TypeError(must(name, "be float16, bfloat16, float32, float64, uint8 or int8", array.dtype))
    if not array.flags.aligned:
        return array.copy(order="K")
    return array


def like(value: Any, name: str, x: Array) -> Array:
    """Return data of x's shape and of the dtype that results for x have."""
    array = data(value, name)
    dtype = result_dtype(x.dtype)
    if array.dtype != dtype:
        raise TypeError(must(name, f"have dtype {dtype}", array.dtype))
    if array.shape != x.shape:
        raise ValueError(must(name, f"have shape {x.shape}", array.shape))
    return array


def parameter(value: Any, name: str, shape: tuple[int, ...]) -> Array | None:
    """Return a parameter as one-dimensional float32 or float64, converted from another real type; None stays."""
    if value is None:
        return None
    array = as_array(value, name)
    if array.dtype not in _DATA_TYPES or not array.flags.aligned:
        real = array.dtype.kind in "iuf" and array.dtype.itemsize <= 8
        if not real and (array.dtype == BFLOAT16_BITS or not _known(array.dtype)):
            raise TypeError(must(name, "have a real dtype of at most 64 bits", array.dtype))
        half = array.dtype.itemsize == 2 and array.dtype.kind not in "iu"
        array = array.astype(np.float32 if half else np.float64)
    if array.shape != shape:
        raise ValueError(must(name, f"have shape {shape}", array.shape))
    return array if array.ndim == 1 else array.reshape(-1)


def required(value: Any, name: str, shape: tuple[int, ...]) -> Array:
    """Return a parameter that must not be None."""
    if value is None:
        raise ValueError(must(name, "be given", "None"))
    array = parameter(value, name, shape)
    assert array is not None
    return array


def _written(value: Any, name: str, requirement: str) -> Array:
    """Return an array, not a copy of what is none."""
    if type(value) is not np.ndarray and (isinstance(value, list | tuple) or np.isscalar(value)):
        raise TypeError(must(name, requirement, type(value).__name__))
    return as_array(value, name)


def moving(value: Any, name: str, shape: tuple[int, ...]) -> Array:
    """Return a moving array that will be updated in place: float32 or float64, writable, of the right shape."""
    array = _written(value, name, "be an array, which is updated in place")
    if array.dtype not in _DATA_TYPES:
        raise TypeError(must(name, "be float32 or float64 in native byte order", array.dtype))
    if array.shape != shape:
        raise ValueError(must(name, f"have shape {shape}", array.shape))
    writable(array, name)
    return array


def writable(array: Array, name: str) -> None:
    """Refuse an array that cannot be written, or in which one value stands at several indices."""
    if not array.flags.writeable:
        raise ValueError(must(name, "be writable", "a read-only array"))
    if not array.flags.aligned:
        raise ValueError(must(name, "be aligned", "an unaligned array"))
    if not array.flags.forc:
        reach = array.itemsize
        for stride, extent in sorted((abs(s), n) for s, n in zip(array.strides, array.shape) if n > 1):
            if stride < reach:
                raise ValueError(must(name, "have a place of its own for every value", f"strides {array.strides}"))
            reach = stride * (extent - 1) + reach


def output(value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], name: str = "out") -> Array:
    """Return an array that results may be written to."""
    array = _written(value, name, "be an array")
    if array.dtype != dtype:
        raise TypeError(must(name, f"have dtype {dtype}", array.dtype))
    if array.shape != shape:
        raise ValueError(must(name, f"have shape {shape}", array.shape))
    writable(array, name)
    return array


def same_memory(a: Array, b: Array) -> bool:
    """Whether two arrays of one shape are the same values at the same places."""
    return a is b or (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and all(s == t for s, t, n in zip(a.strides, b.strides, a.shape) if n > 1)  # of one index any stride will do
        and a.dtype == b.dtype
    )


def overlap(a: Array, b: Array | None) -> bool:
    """Whether two arrays share a byte; also where that would take long to find out."""
    if b is None or not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]  # any integer will do
    except np.exceptions.TooHardError:
        return True


def apart(array: Array, name: str, **others: Array | None) -> None:
    """Refuse an array that will be written and shares memory with another."""
    for other_name, other in others.items():
        if overlap(array, other):
            raise ValueError(must(name, f"not share memory with {other_name}", "overlapping arrays"))


def in_place_or_apart(out: Array, name: str, source: Array, source_name: str) -> None:
    """Refuse a partial overlap: out may be the source itself, or another array."""
    if not same_memory(out, source) and overlap(out, source):
        raise ValueError(must(name, f"be {source_name} itself or not share memory with it", "a partial overlap"))


def real(value: Any, name: str, low: float, high: float, words: str) -> float:
    """Return a finite number in a closed range as a float."""
    if type(value) is not float:
        if isinstance(value, _NOT_REAL) or getattr(value, "ndim", False):
            raise TypeError(must(name, "be a real number", repr(value)))
        try:
            value = float(value)
        except OverflowError:
            value = math.inf if value > 0 else -math.inf
        except (TypeError, ValueError):
            raise TypeError(must(name, "be a real number", repr(value))) from None
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError(must(name, f"be {words}", value))
    return float(value)


def epsilon(value: Any) -> float:
    """Return the number that is added to the variance."""
    return real(value, "epsilon", 0.0, math.inf, "finite and at least 0")


def momentum(value: Any) -> float:
    """Return the share of the old value that a moving average keeps."""
    return real(value, "momentum", 0.0, 1.0, "in [0, 1]")


def ddof(value: Any) -> int:
    """Return 0 or 1."""
    number = _index(value, "ddof", "be 0 or 1")
    if number not in (0, 1):
        raise ValueError(must("ddof", "be 0 or 1", number))
    return number


def not_zero(array: Array, name: str, where: str) -> None:
    """Refuse a parameter that something is divided by."""
    if not array.all():
        raise ValueError(must(name, f"have no zeros {where}", f"one in channel {int(np.argmin(array != 0))}"))


def not_negative(array: Array, name: str, where: str = "") -> None:
    """Refuse negative numbers; NaN is none."""
    if (array < 0).any():
        raise ValueError(must(name, f"not be negative{where}", array[array < 0].min()))


def one_of(value: Any, name: str, words: tuple[str, ...]) -> str:
    """Return one of some words."""
    if not isinstance(value, str):
        raise TypeError(must(name, "be a string", repr(value)))
    if value not in words:
        raise ValueError(must(name, "be one of " + ", ".join(words), repr(value)))
    return value


def flag(value: Any, name: str) -> bool:
    """Return a truth value."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise TypeError(must(name, "be a bool", repr(value)))


def count(value: Any, name: str = "count") -> int:
    """Return a number of things, 0 or more."""
    number = _index(value, name, "be an integer")
    if number < 0:
        raise ValueError(must(name, "be at least 0", number))
    return number


def _index(value: Any, name: str, requirement: str) -> int:
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except TypeError:  # of arrays too, which have the method
        pass
    raise TypeError(must(name, requirement, repr(value)))


def mapping(value: Any, name: str) -> None:
    """Refuse what has no names."""
    if not isinstance(value, Mapping):
        raise TypeError(must(name, "be a mapping", type(value).__name__))
