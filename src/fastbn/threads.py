"""How many threads a call uses.

The count comes from the first of these that is set: the enclosing `threads` block, `set_num_threads`,
``FASTBN_NUM_THREADS`` (read at import), ``OMP_NUM_THREADS`` (as the OpenMP runtime read it), and otherwise
the processors this process may use: the smallest of the OpenMP maximum, the CPU affinity and the cgroup
quota.

Three things then hold whatever was asked for:

- A limit on the OpenMP runtime, as threadpoolctl sets it, is never exceeded. libgomp keeps that limit per
  thread, so it is read on every call, and a thread outside the limit is not affected by it.
- Inside a parallel region the count is 1: the cores are taken already.
- In a forked child the count is 1: the threads of libgomp do not survive a fork, and the first parallel
  region with more than one thread would wait for them for ever.

Nothing here calls ``omp_set_num_threads`` or writes an environment variable: both would change other
libraries. The count is passed to each parallel region instead. Results do not depend on it, only the time
does.

Affinity and quota are read at import, and again by ``set_num_threads(None)``: reading them costs more than
all other work of a small call, and the OpenMP runtime does not follow later changes either.
"""

import contextlib
import contextvars
import math
import operator
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .kernels import _runtime

__all__ = ["cgroup_limit", "get_num_threads", "set_num_threads", "thread_info", "threads"]

# Beyond any machine in use; libgomp ends the process if it cannot start the threads it was asked for.
_MOST_THREADS = 4096


def _quota_v2(folder: Path) -> float:
    """CPUs that ``cpu.max`` allows: "<quota> <period>" in microseconds, or "max <period>"."""
    quota, period = (folder / "cpu.max").read_text().split()
    return math.inf if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float:
    """CPUs that the CFS quota of cgroup version 1 allows; a quota of -1 is none."""
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    period = int((folder / "cpu.cfs_period_us").read_text())
    return math.inf if quota <= 0 else quota / period


def cgroup_limit(root: str | os.PathLike[str] = "/") -> int | None:
    """Return the CPUs that the cgroup quota of this process allows, rounded up, or None without a quota.

    Every group from that of the process up to the root counts, the smallest quota decides. Both versions of
    cgroups are read. Inside a container the path of the group may be that of the host and not exist; what is
    mounted at the top is then the group of the container, and the walk ends there.

    Parameters
    ----------
    root : path
        Where the file system starts; a test passes a folder with ``proc`` and ``sys`` of its own.
    """
    root = Path(root)
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    top = root / "sys/fs/cgroup"
    smallest = math.inf
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if hierarchy == "0" and not controllers:
            mounts, quota = ["", "unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, quota = [controllers, "cpu"], _quota_v1
        else:
            continue
        # A cgroup namespace writes groups above its own root as "..".
        inside = PurePosixPath(*(part for part in PurePosixPath(group).parts if part not in ("/", "..")))
        for mount in mounts:
            for step in (inside, *inside.parents):
                with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                    smallest = min(smallest, quota(top / mount / step))
    return None if math.isinf(smallest) else max(1, math.ceil(smallest))


def _affinity() -> int:
    """Return the number of processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _usable_cpus() -> int:
    """Return the cap of the default count beside the OpenMP maximum."""
    if os.environ.get("OMP_NUM_THREADS", "").strip():
        return _MOST_THREADS  # the user decided, and the runtime has read it
    quota = cgroup_limit()
    return _affinity() if quota is None else min(_affinity(), quota)


def _from_environment() -> int | None:
    """Return ``FASTBN_NUM_THREADS``, None if it is unset or empty."""
    text = os.environ.get("FASTBN_NUM_THREADS", "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= _MOST_THREADS):
        raise ValueError(f"FASTBN_NUM_THREADS must be a positive integer up to {_MOST_THREADS}, got {text!r}")
    return int(text)


def _checked(n: int) -> int:
    """Return n as an int; TypeError or ValueError if it is not a number of threads."""
    if isinstance(n, bool):
        raise TypeError(f"n must be a positive integer, got {n!r}")
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"n must be a positive integer, got {n!r}") from None
    if count < 1:
        raise ValueError(f"n must be a positive integer, got {count}")
    if count > _MOST_THREADS:
        raise ValueError(f"n must be at most {_MOST_THREADS}, got {count}")
    return count


def _unlimited() -> int:
    """Return the OpenMP maximum of a thread that nobody has limited.

    That is the maximum at import, unless the import itself runs under a limit: without ``OMP_NUM_THREADS``
    the runtime starts from the number of processors.
    """
    if os.environ.get("OMP_NUM_THREADS", "").strip():
        return _runtime.max_threads()
    return max(_runtime.max_threads(), _runtime.num_procs())


_block: contextvars.ContextVar[int | None] = contextvars.ContextVar("fastbn_threads", default=None)
_environment = _from_environment()
_setting: int | None = _environment
_cpus = _usable_cpus()
_omp_unlimited = _unlimited()
_forked = False
_serial = _runtime.openmp_version() == 0
_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # of locks, by id: some may be equal


def give_lock(owner: Any) -> None:
    """Make ``owner._lock``, and make it anew in a forked child, where another thread's would stay locked for ever."""
    owner._lock = threading.Lock()
    _owners[id(owner)] = owner


def _after_fork_in_child() -> None:
    global _forked, _serial
    _forked = _serial = True
    for owner in _owners.values():
        owner._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def get_num_threads() -> int:
    """Return the number of threads that a large call of the calling thread uses now.

    Small arrays are worked on by fewer. See `set_num_threads` for what decides.

    Returns
    -------
    int
        At least 1; 1 in a forked child, inside an OpenMP parallel region and in a build without OpenMP.

    See Also
    --------
    set_num_threads, threads
    """
    if _serial or _runtime.in_parallel():
        return 1
    omp = _runtime.max_threads()
    count = _block.get()
    if count is None:
        count = _setting
    if count is None:
        return omp if omp < _cpus else _cpus
    # Below its start value, the runtime has been limited; at it, the caller may ask for more threads than
    # cores.
    return omp if omp < count and omp < _omp_unlimited else count


def set_num_threads(n: int | None) -> None:
    """Set the number of threads for all calls of this process.

    Results do not depend on the number of threads, bit for bit.

    Parameters
    ----------
    n : int or None
        At least 1; may exceed the number of cores. None goes back to the default: ``FASTBN_NUM_THREADS`` if
        it was set when fastbn was imported, else ``OMP_NUM_THREADS``, else the processors that affinity and
        cgroup quota leave to this process, which are read anew.

    Raises
    ------
    TypeError
        If n is not an integer.
    ValueError
        If n is not positive.

    See Also
    --------
    threads : the same for a block of code, and for the calling thread only.

    Notes
    -----
    A limit set with threadpoolctl is honoured even if n is larger.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.set_num_threads(1)
    >>> fastbn.get_num_threads()
    1
    >>> fastbn.set_num_threads(None)
    """
    global _setting, _cpus
    if n is None:
        _cpus = _usable_cpus()
        _setting = _environment
    else:
        _setting = _checked(n)


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    token = _block.set(n)
    try:
        yield
    finally:
        _block.reset(token)


def threads(n: int) -> "contextlib._GeneratorContextManager[None]":
    """Use n threads within a ``with`` block, or within a function that is decorated with it.

    It holds for the calling thread (in asynchronous code: for the task) and ends with the block. Blocks
    nest; the inner one counts. It goes before `set_num_threads`.

    Parameters
    ----------
    n : int
        At least 1.

    Returns
    -------
    context manager
        Also a decorator.

    Raises
    ------
    TypeError
        If n is not an integer.
    ValueError
        If n is not positive.

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.threads(1):
    ...     fastbn.get_num_threads()
    1
    """
    return _threads(_checked(n))


def thread_info() -> dict[str, Any]:
    """Return everything the number of threads depends on, for bug reports; all values fit JSON."""
    return {
        "openmp": _runtime.openmp_version() or None,
        "omp_max_threads": _runtime.max_threads(),
        "affinity": _affinity(),
        "cgroup_limit": cgroup_limit(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "FASTBN_NUM_THREADS": os.environ.get("FASTBN_NUM_THREADS"),
        "forked": _forked,
        "threads": get_num_threads(),
    }
