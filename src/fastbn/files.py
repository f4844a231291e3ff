"""Files that appear under their name only when they are complete."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["atomic_file"]


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that appears under its name only when it is complete.

    The block writes to a temporary file in the same folder; at its end the file is flushed to the disk and
    renamed. If anything fails, the temporary file is removed and what was at `path` before is untouched.

    Parameters
    ----------
    path : path
        The file to write; no extension is added. Its permissions become those that ``open(path, "wb")``
        would leave, and a symbolic link is followed.

    Yields
    ------
    file
        Open for writing and reading, so that it can be mapped to memory as well.

    Raises
    ------
    OSError
        If the file cannot be written, or `path` is a folder, a device or a pipe, which renaming would
        destroy.
    """
    target = os.path.realpath(path)  # renaming onto a link would replace the link
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".fastbn-{os.urandom(8).hex()}.tmp")
    try:
        with _create(temporary, target, os.fspath(path)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _flush_folder(folder)


def _create(temporary: str, target: str, path: str) -> BinaryIO:
    """Create the temporary file with the permissions of the target; errors name `path`."""
    try:
        mode = _mode_of_replaceable(target)
        file = open(temporary, "x+b")  # noqa: SIM115  (the caller closes it)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    if mode is not None:
        with contextlib.suppress(PermissionError):
            os.chmod(temporary, mode)
    return file


def _mode_of_replaceable(target: str) -> int | None:
    """Return the permissions of an existing file, None without one; OSError if it must not be replaced."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file")
    if not os.access(target, os.W_OK):  # renaming would get around the permissions
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    return stat.S_IMODE(mode)


def _flush_folder(folder: str) -> None:
    """Flush the rename itself. Not every file system can, and the file is complete in any case."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
