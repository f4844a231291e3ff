"""The level of the kernels that this process uses: the best that was built and that the processor supports.

Every level is a pair of modules built from the same source for another instruction set. A module above what the
processor supports is never imported: its initialization alone could be an illegal instruction. All levels give the same
bits, so the choice is one of speed only.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from ..errors import must
from . import _cpu

LEVELS = ("base", "v3", "v4")


def built() -> tuple[str, ...]:
    """Return the levels that this installation has."""
    return tuple(level for level in LEVELS if find_spec(f"{__package__}._planar_{level}") is not None)


def choose(wanted: str | None) -> str:
    """Return the level to use.

    Parameters
    ----------
    wanted : str or None
        Of the environment variable ``FASTBN_ISA``; None or "" for the best.

    Returns
    -------
    str
        A level that is built and supported.

    Raises
    ------
    ValueError
        If the level wanted is unknown, not built, or not supported by this processor.
    """
    usable = [level for level in built() if level in _cpu.supported()]
    if not wanted:
        return usable[-1]
    if wanted not in usable:
        raise ValueError(must("FASTBN_ISA", "be one of " + ", ".join(usable) + " here", repr(wanted)))
    return wanted


def drivers(level: str) -> tuple[ModuleType, ModuleType]:
    """Return the modules of a level, in the order of `Plan.pattern`: planar, interleaved."""
    return (
        import_module(f"{__package__}._planar_{level}"),
        import_module(f"{__package__}._interleaved_{level}"),
    )


level = choose(os.environ.get("FASTBN_ISA"))
