"""What this build and this process use: for bug reports and `fastbn info`."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any, Literal, overload

import numpy as np

from .errors import must
from .kernels import _cpu, dispatch
from .threads import thread_info


@overload
def show_config(mode: Literal["stdout"] = ...) -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Show versions, the instruction set level of the kernels, and what the number of threads comes from.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default: "stdout"
        Whether to print, or to return a dictionary.

    Returns
    -------
    dict or None
        With mode "dicts": keys "fastbn", "python", "numpy", "machine", "level" (of the kernels in use),
        "levels_built", "levels_supported" (by the processor), "own_cache" (bytes of a core's second level cache, by
        which the kernels walk memory: as the system reports them, from 256 KB to 2 MB, or 1 MB) and "threads".

    Raises
    ------
    ValueError
        If the mode is unknown.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.show_config(mode="dicts")["level"] in ("base", "v3", "v4")
    True
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(must("mode", "be 'stdout' or 'dicts'", repr(mode)))
    config = {
        "fastbn": metadata.version("fastbn"),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "level": dispatch.level,
        "levels_built": list(dispatch.built()),
        "levels_supported": list(_cpu.supported()),
        "own_cache": _cpu.own_cache(),
        "threads": thread_info(),
    }
    if mode == "dicts":
        return config
    for key, value in config.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, setting in value.items():
                print(f"  {name}: {setting}")
        else:
            print(f"{key}: {value}")
    return None
