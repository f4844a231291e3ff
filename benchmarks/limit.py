"""The bandwidth limit of an operation, measured: limit.c, compiled when it is first asked for."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LINE = 64
SMALL = 1 << 20  # bytes of an array: smaller ones stay in a core's own cache


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """Return limit.c as a library, or None where no C compiler with OpenMP is found."""
    compiler = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "limit.so"
        source = Path(__file__).with_name("limit.c")
        command = [
            *compiler.split(),
            "-O3",
            "-march=native",
            "-fopenmp",
            "-shared",
            "-fPIC",
            str(source),
            "-o",
            str(built),
        ]
        if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode:
            return None
        loaded = ctypes.CDLL(str(built))  # stays in memory when the file is gone
    pointer, number = ctypes.c_void_p, ctypes.c_int
    loaded.limit.argtypes = [pointer, pointer, pointer, ctypes.c_ssize_t, number, number, number, number]
    loaded.limit.restype = ctypes.c_float
    return loaded


def _lines(nbytes: int) -> NDArray[np.uint8]:
    """Return whole cache lines that hold so many bytes, touched so that they exist."""
    raw = np.ones(max(1, -(-nbytes // LINE)) * LINE + LINE, np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + (raw.size - LINE)]


def calls(nbytes: int, *, pair: bool = False, writes: float = 1, threads: int = 1) -> dict[str, Callable[[], object]]:
    """Return what moves as much as an operation has to: in each way there is.

    The limit is the quickest of them (`least`). The calls hold their own arrays.

    Parameters
    ----------
    nbytes : int
        Of each array that is read.
    pair : bool
        Whether there are two of them.
    writes : {0, 0.5, 1, 2, 4}
        Bytes written for each byte of an array read.
    threads : int
        As many as the contenders have.

    Returns
    -------
    dict of str to callable
        Empty without a compiler.
    """
    lib = compiled()
    if lib is None:
        return {}
    lu, ly = {0: (1, 0), 0.5: (2, 1), 1: (1, 1), 2: (1, 2), 4: (1, 4)}[writes]
    u = _lines(nbytes)
    y = _lines(int(u.size * writes))
    v = _lines(nbytes) if pair else None
    groups = u.size // LINE // lu

    def call(stream: int, team: int) -> Callable[[], object]:
        pointers = u.ctypes.data, None if v is None else v.ctypes.data, y.ctypes.data

        def move(held=(u, v, y)) -> object:
            return lib.limit(*pointers, groups, lu, ly, stream, team)

        return move

    found = {"limit": call(0, threads)}
    if writes and nbytes > SMALL:
        found["limit past the caches"] = call(1, threads)
    if threads > 1 and nbytes <= SMALL:  # where a team of threads costs more than it brings
        found["limit of one thread"] = call(0, 1)
    return found


def least(times: dict[str, float]) -> float:
    """Take the limit's times out of a measurement, and return the least; infinity without any."""
    return min((times.pop(name) for name in [n for n in times if n.startswith("limit")]), default=float("inf"))
