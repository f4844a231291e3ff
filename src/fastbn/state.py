"""State files: named arrays with a JSON header, written whole or not at all.

The file is a plain .npz (see `fastbn.npz`). Its entry ``header`` is a uint8 array that holds UTF-8 JSON,

    {"format": "fastbn", "version": 1, "kind": "batch_norm", "fastbn": "<version of the library>",
     "fields": {<what the caller wants back>},
     "arrays": {"<name>": {"dtype": "<f4", "shape": [64], "sha256": "<of the bytes>"}, ...}}

and every other entry is one of the arrays announced there. Whatever is wrong with a file that is read is one
`StateError`, which names the file.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import StateError
from .files import atomic_file
from .npz import NAME, PlainNpz, open_npz, write_npz

__all__ = ["atomic_file", "check_statistics", "read_kind", "read_state", "write_state"]

FORMAT = "fastbn"
VERSION = 1
KINDS = ("batch_norm", "moments", "variables")

_HEADER = "header"
_HEADER_KEYS = ("format", "version", "kind", "fastbn", "fields", "arrays")
_MAX_HEADER = 1 << 20  # bytes
_DTYPES = ("<f4", "<f8", "<i8")


def write_state(
    path: str | os.PathLike[str], kind: str, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> None:
    """Write arrays and header fields to a state file, atomically.

    Parameters
    ----------
    path : path
        The file to write; no extension is added.
    kind : {"batch_norm", "moments"}
        What the file holds.
    header : mapping
        Fields that JSON can hold; `read_state` returns them.
    arrays : mapping of str to ndarray
        float32, float64 or int64, of any shape.

    Raises
    ------
    TypeError, ValueError
        If a name, a dtype or a field has no place in a state file. Nothing has been written then.
    OSError
        If the file cannot be written, see `atomic_file`.
    """
    from . import __version__  # not at the top: the package itself imports this module

    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    plain = {name: _plain(name, array) for name, array in arrays.items()}
    announced = {
        name: {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": _sha256(array)}
        for name, array in plain.items()
    }
    head = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "fastbn": __version__,
        "fields": dict(header),
        "arrays": announced,
    }
    text = json.dumps(head, allow_nan=False, sort_keys=True).encode()
    if len(text) > _MAX_HEADER // 2:
        raise ValueError(f"header must have at most {_MAX_HEADER // 2} bytes of JSON, got {len(text)}")
    with atomic_file(path) as file:
        write_npz(file, {_HEADER: np.frombuffer(text, np.uint8), **plain})


def read_state(
    path: str | os.PathLike[str],
    kind: str | None = None,
    *,
    required: Collection[str] | None = None,
    optional: Collection[str] = (),
    fields: Collection[str] | None = None,
    optional_fields: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read a state file.

    The file is intact when this returns: header and arrays agree in names, dtypes, shapes and checksums.
    Whether the values make sense is for the caller to say, see `check_statistics`.

    Parameters
    ----------
    path : path
        The file to read.
    kind : {"batch_norm", "moments"}, optional
        What the file has to hold; by default either.
    required, optional : collections of str
        Names of the arrays that must and that may be there; by default any.
    fields, optional_fields : collections of str
        Names of the header fields that must and that may be there; by default any.

    Returns
    -------
    header : dict
        The header fields.
    arrays : dict of str to ndarray
        Writable arrays with memory of their own.

    Raises
    ------
    StateError
        If the file is not an intact state file of this kind and of a known version.
    OSError
        If the file does not exist or must not be read.
    """
    with open_npz(path) as npz:
        head = _read_header(npz, kind)
        announced = head["arrays"]
        _compare(npz, "array", [name for name in npz.names if name != _HEADER], announced)
        if required is not None:
            _compare(npz, "array", announced, required, optional)
        if fields is not None:
            _compare(npz, "header field", head["fields"], fields, optional_fields)
        return head["fields"], {name: _read_array(npz, name, announced[name]) for name in announced}


def read_kind(path: str | os.PathLike[str]) -> str:
    """Return what a state file holds, "batch_norm" or "moments"; only its header is read.

    Parameters
    ----------
    path : path
        The file to look into.

    Returns
    -------
    str
        One of the kinds of `write_state`.

    Raises
    ------
    StateError
        If the file is not a state file of a known version.
    OSError
        If the file does not exist or must not be read.
    """
    with open_npz(path) as npz:
        return str(_read_header(npz, None)["kind"])


def _read_header(npz: PlainNpz, kind: str | None) -> dict[str, Any]:
    if _HEADER not in npz.names:
        npz.fail("is not a fastbn state file")
    text = npz.array(_HEADER, ("|u1",), max_bytes=_MAX_HEADER).tobytes()
    try:
        head = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        npz.fail("has a header that is not JSON", error)
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        npz.fail("is not a fastbn state file")
    version = head.get("version")
    if type(version) is not int or version < 1:
        npz.fail(f"has format version {version!r}")
    if version > VERSION:
        npz.fail(f"has format version {version}, this fastbn reads up to {VERSION}; upgrade fastbn to read it")
    _compare(npz, "header entry", head, _HEADER_KEYS)
    if head["kind"] not in KINDS:
        npz.fail(f"has unknown kind {head['kind']!r}")
    if kind is not None and head["kind"] != kind:
        npz.fail(f"must be of kind {kind!r}, got {head['kind']!r}")
    if not isinstance(head["fields"], dict) or not isinstance(head["arrays"], dict):
        npz.fail("has a header of the wrong structure")
    return head


def _read_array(npz: PlainNpz, name: str, announced: Any) -> NDArray[Any]:
    """Return one array that is as the header announced it."""
    if not isinstance(announced, dict) or announced.keys() != {"dtype", "shape", "sha256"}:
        npz.fail(f"has a header of the wrong structure at {name!r}")
    array = npz.array(name, _DTYPES)
    if array.dtype.str != announced["dtype"]:
        npz.fail(f"{name} must have dtype {announced['dtype']}, got {array.dtype.str}")
    if list(array.shape) != announced["shape"]:
        npz.fail(f"{name} must have shape {announced['shape']}, got {list(array.shape)}")
    if _sha256(array) != announced["sha256"]:
        npz.fail(f"{name} does not match its checksum")
    return array.astype(array.dtype.newbyteorder("="))  # a copy, so writable


def _compare(
    npz: PlainNpz,
    noun: str,
    found: Collection[str],
    required: Collection[str],
    optional: Collection[str] = (),
) -> None:
    for name in required:
        if name not in found:
            npz.fail(f"has no {noun} {name!r}")
    for name in found:
        if name not in required and name not in optional:
            npz.fail(f"has an unknown {noun} {name!r}")


def _plain(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """Return the array little-endian and in C order."""
    if not NAME.fullmatch(name) or name == _HEADER:
        raise ValueError(f"array names must be lower-case identifiers other than {_HEADER!r}, got {name!r}")
    array = np.asarray(array)
    dtype = array.dtype.newbyteorder("<")
    if dtype.str not in _DTYPES:
        raise TypeError(f"{name} must be float32, float64 or int64, got {array.dtype}")
    return np.asarray(array, dtype, order="C")


def _sha256(array: NDArray[Any]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def check_statistics(
    source: object, mean: ArrayLike, variance: ArrayLike, *, names: tuple[str, str] = ("mean", "variance")
) -> None:
    """Check that values from a file can be statistics of channels; StateError naming `source` if not.

    Parameters
    ----------
    source : path or str
        Where the values come from, for the message.
    mean, variance : (C,) array_like
        Must be finite and of one length, and variance not negative. M2 obeys the same rules.
    names : tuple of two str
        What messages call them.
    """
    mean, variance = np.asarray(mean), np.asarray(variance)
    if mean.ndim != 1 or variance.shape != mean.shape:
        shapes = f"{mean.shape} and {variance.shape}"
        raise StateError(f"{source}: {names[0]} and {names[1]} must have one shape (C,), got {shapes}")
    if not np.isfinite(mean).all():
        raise StateError(f"{source}: {names[0]} must be finite")
    if not (np.isfinite(variance) & (variance >= 0)).all():
        raise StateError(f"{source}: {names[1]} must be finite and not negative")
