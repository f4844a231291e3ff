"""Files of named arrays in the safetensors format, through the package of that name (extra ``safetensors``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import StateError, must
from ..files import atomic_file
from . import _weights

Array = NDArray[Any]


def load_safetensors(path: str | os.PathLike[str], prefix: str = "") -> dict[str, Array]:
    """Read arrays from a safetensors file; only those that are asked for leave the disk.

    Parameters
    ----------
    path : path
        The file.
    prefix : str, default: ""
        Read only names that begin with this, "layer1.bn1." for instance. It stays part of the names.

    Returns
    -------
    dict
        Arrays by name, in the order of the file, for `from_torch` and the others. bfloat16 becomes float32.

    Raises
    ------
    ImportError
        Without the package.
    TypeError
        If ``prefix`` is not a string.
    StateError
        If the file is not an intact safetensors file, or has no name with this prefix, or a dtype that NumPy does not
        know, such as an 8-bit float.
    OSError
        If the file cannot be read.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        _weights.missing("safetensors", '"fastbn[safetensors]"', error)
    if not isinstance(prefix, str):
        raise TypeError(must("prefix", "be a string", repr(prefix)))
    with open(path, "rb"):  # its own error for a file that is not there or must not be read
        pass
    found = {}
    try:
        with safe_open(os.fspath(path), framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if name.startswith(prefix):
                    found[name] = _read(file, name)
    except (SafetensorError, TypeError) as error:
        raise StateError(f"{os.fspath(path)}: {error}") from error
    if not found:
        raise StateError(f"{os.fspath(path)}: has no tensor whose name begins with {prefix!r}")
    return found


def _read(file: Any, name: str) -> Array:
    try:
        value = np.asarray(file.get_tensor(name))
    except AttributeError as error:  # of the module numpy
        dtype = file.get_slice(name).get_dtype()
        raise TypeError(f"{name} has the dtype {dtype}, which NumPy does not know") from error
    return value.astype(np.float32) if value.dtype.name == "bfloat16" else value


def save_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays to a safetensors file, atomically: it is whole, or as it was before.

    Parameters
    ----------
    path : path
        The file; no extension is added.
    arrays : mapping of str to array
        As `to_torch` returns them, or several of these merged. Tensors of PyTorch and arrays of JAX are taken too.
    metadata : mapping of str to str, optional
        Kept in the header of the file.

    Raises
    ------
    ImportError
        Without the package.
    TypeError
        If ``arrays`` is not a mapping of names to arrays of real numbers, at most as wide as float64, or ``metadata``
        not one of strings.
    ValueError
        If an array has the name ``__metadata__``, which the format keeps for itself.
    OSError
        If the file cannot be written.
    """
    try:
        from safetensors.numpy import save
    except ImportError as error:
        _weights.missing("safetensors", '"fastbn[safetensors]"', error)
    plain = {
        name: np.array(_weights.array(value, name), order="C")
        for name, value in _weights.mapping(arrays, "arrays").items()
    }
    for name, value in plain.items():
        if value.dtype.kind == "f" and value.dtype.itemsize > 8:
            raise TypeError(must(name, "have a dtype that the format knows", value.dtype))
        if name == "__metadata__":  # where the header keeps them
            raise ValueError(must("arrays", "have other names than the header's", repr(name)))
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(must("metadata", "be a mapping of strings to strings", repr(metadata)))
    for key, text in (metadata or {}).items():
        if not all(isinstance(word, str) for word in (key, text)):
            raise TypeError(must("metadata", "be a mapping of strings to strings", f"{key!r}: {text!r}"))
    content = save(plain, None if metadata is None else dict(metadata))
    with atomic_file(path) as file:
        file.write(content)
