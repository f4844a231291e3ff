"""What all converters share: arrays of any framework, names below a prefix, and a layer made of them."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import must
from ..layer import BatchNorm

Array = NDArray[Any]

_SHOWN: Final = 8  # names that a message lists
# The arrays that give a layer its shape, the surest first.
_OURS: Final = ("moving_mean", "moving_variance", "gamma", "beta")


class Unset(enum.Enum):
    """The default of an argument where None means something."""

    UNSET = "of the source, or the framework's default"

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET


def array(value: Any, name: str) -> Array:
    """Return the numbers that a framework's array holds, as a NumPy array of a real dtype; may be the same memory."""
    if hasattr(value, "detach"):  # a PyTorch tensor, which may need a gradient, be elsewhere, or be a bfloat16
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    elif not hasattr(value, "__array__"):  # variables of TensorFlow, of a checkpoint, of fastbn.compat
        if callable(getattr(value, "numpy", None)):
            value = value.numpy()
        elif hasattr(value, "value"):
            value = value.value
    try:
        found = np.asarray(value)
    except Exception as error:
        raise TypeError(must(name, "be an array", f"{type(value).__name__}: {error}")) from error
    if found.dtype.kind not in "iuf" and found.dtype.name != "bfloat16":
        raise TypeError(must(name, "be an array of real numbers", f"{type(value).__name__} of dtype {found.dtype}"))
    return found


def flat(value: Array, name: str, axis: int | tuple[int, ...]) -> Array:
    """Return a parameter with the channel axes alone, in the order given.

    TensorFlow kept axes of one value beside them where there were several, and one more in front for virtual batches.
    """
    if name.endswith("_weight"):
        return value.reshape(()) if value.size == 1 else value
    axes = axis if isinstance(axis, tuple) else (axis,)
    if value.ndim <= len(axes):
        return value
    for lead in (0, 1):  # without and with virtual batches
        rank = value.ndim - lead
        places = [(a % rank) + lead for a in axes if -rank <= a < rank]
        others = [place for place in range(value.ndim) if place not in places]
        if len(places) == len(axes) and all(value.shape[place] == 1 for place in others):
            return value.transpose([*places, *others]).reshape([value.shape[place] for place in places])
    raise ValueError(must(name, f"have one value per channel of axis {axis}", f"shape {value.shape}"))


def listed(names: Iterable[object]) -> str:
    """Return names for a message, shortened."""
    known = sorted(map(str, names))
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return (", ".join(known[:_SHOWN]) or "none") + more


def unique(names: Sequence[str]) -> list[str]:
    """Return names, of which those that came before get the next free number: bn, bn_1, as Keras counts."""
    known = set(names)
    seen: set[str] = set()
    result = []
    for name in names:
        free = name
        if name in seen:
            free = next(n for n in (f"{name}_{i}" for i in itertools.count(1)) if n not in known)
            known.add(free)
        seen.add(name)
        result.append(free)
    return result


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """Return a mapping with string keys."""
    if not isinstance(value, Mapping):
        raise TypeError(must(name, "be a mapping of names to arrays", type(value).__name__))
    for key in value:
        if not isinstance(key, str):
            raise TypeError(must(name, "have strings as names", repr(key)))
    return value


def text(value: Any, name: str) -> str:
    """Return a prefix, a scope or a path."""
    if not isinstance(value, str):
        raise TypeError(must(name, "be a string", repr(value)))
    return value


def below(state: Mapping[str, Any], prefix: str, separator: str) -> dict[str, Any]:
    """Return what is below a prefix, without it."""
    text(prefix, "prefix")
    start = prefix if not prefix or prefix.endswith(separator) else prefix + separator
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}


def path(prefix: str, name: str, separator: str) -> str:
    """Return the whole name."""
    return f"{prefix.rstrip(separator)}{separator}{name}" if prefix else name


def taken(
    state: Mapping[str, Any],
    prefix: str,
    separator: str,
    required: Collection[str],
    optional: Collection[str],
    everything: Collection[str],
) -> dict[str, Any]:
    """Return the entries of one layer after a check of their names; `everything` is for the message."""
    for name in required:
        if state.get(name) is None:
            raise ValueError(must("source", f"have {path(prefix, name, separator)!r}", listed(everything)))
    for name in state:
        if name not in required and name not in optional:
            words = (
                "have no other names than " + ", ".join([*required, *optional]) + (f" below {prefix}" * bool(prefix))
            )
            raise ValueError(must("source", words, path(prefix, name, separator)))
    return {name: value for name, value in state.items() if value is not None}


def layer(arrays: Mapping[str, Any], names: Mapping[str, str], batches: int = 0, **arguments: Any) -> BatchNorm:
    """Return a layer with these arrays.

    Parameters
    ----------
    arrays : mapping
        Arrays by fastbn's names; which of them there are decides about ``scale``, ``center`` and ``track``.
    names : mapping
        The same arrays' names in their framework, for messages.
    batches : int
        Batches that reached the statistics.
    **arguments
        Of `BatchNorm`. Without ``dtype`` it is float64 if one of the arrays is, else float32.

    Raises
    ------
    TypeError, ValueError
        If an array, or an argument, is not what it must be; if there are more or fewer axes than channel axes.
    """
    found = {ours: array(value, names[ours]) for ours, value in arrays.items()}
    first = next(ours for ours in _OURS if ours in found)
    shape = found[first].shape
    for ours, value in found.items():
        wanted = () if ours.endswith("_weight") else shape
        if value.shape != wanted:
            raise ValueError(
                must(names[ours], f"have shape {wanted}" + f" as {names[first]}" * bool(wanted), value.shape)
            )
        if ours == "moving_variance" and (value < 0).any():
            raise ValueError(must(names[ours], "not be negative", value.min()))
    axis = arguments.get("axis", -1)
    count = len(axis) if isinstance(axis, Sequence) and not isinstance(axis, str) else 1
    if len(shape) != count:  # the layer would fail with its first batch
        raise ValueError(must(names[first], f"have as many axes as there are channel axes, {count}", f"shape {shape}"))
    if arguments.get("dtype") is None:
        wide = any(value.dtype == np.float64 for value in found.values())
        arguments["dtype"] = np.float64 if wide else np.float32
    track = "moving_mean" in found
    if not track:  # an argument only where it matters
        arguments["track"] = False
    made = BatchNorm(scale="gamma" in found, center="beta" in found, **arguments)
    dtype = made.dtype
    state = {ours: value.astype(dtype) for ours, value in found.items()}
    made.load_state_dict({**state, "batches": batches})
    return made


def batches(value: Any, name: str) -> int:
    """Return a counter of batches from a number or an array of one, which a conversion may have made a float."""
    if value is None:
        return 0
    number = array(value, name)
    if number.size != 1 or number.item() < 0 or not float(number.item()).is_integer():
        raise ValueError(must(name, "be one integer, at least 0", number.tolist()))
    return int(number.item())


def chosen(value: Any, otherwise: Any) -> Any:
    """Return an argument, or what stands in for it."""
    return otherwise if value is UNSET else value


def state_of(bn: Any) -> dict[str, Any]:
    """Return the state of a built layer."""
    if not isinstance(bn, BatchNorm):
        raise TypeError(must("bn", "be a fastbn.BatchNorm", type(bn).__name__))
    if not bn.built:
        raise ValueError(must("bn", "be built by a call or by build(num_features)", "one that is not"))
    return bn.state_dict()


def one_axis(bn: BatchNorm, framework: str) -> None:
    """Refuse what a framework has no parameters for, and what would be lost in silence."""
    shape = bn._existing().shape
    if len(shape) > 1:
        raise ValueError(must("bn", f"have one channel axis for {framework}", f"parameters of shape {shape}"))
    if bn.activation is not None:
        raise ValueError(must("bn", f"have no activation for {framework}, which has none here", repr(bn.activation)))


def missing(package: str, extra: str, error: ImportError) -> NoReturn:
    """Say which package is missing, and how to get it."""
    raise ImportError(f"{package} must be installed for this: pip install {extra}") from error
