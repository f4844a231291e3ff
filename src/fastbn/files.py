"""Files that appear under their name only when they are complete."""

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

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
        If the file cannot be written, or `path` is a folder, also one that does not exist ("new/"), or a
        device or a pipe, which renaming would destroy. What fails in writing names `path`.
    """
    target = os.path.realpath(path)  # renaming onto a link would replace the link
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f".fastbn-{os.urandom(8).hex()}.tmp")
    name = os.fspath(path)
    try:
        with _create(temporary, name) as file:
            yield file
            with _naming(name):
                file.flush()
                os.fsync(file.fileno())
        with _naming(name):
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _flush_folder(folder)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Let errors name `path`, which the user knows, instead of the temporary file or none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


class _Temporary(io.FileIO):
    """A new file whose errors in writing name `path`, as which it will appear."""

    def __init__(self, temporary: str, path: str) -> None:
        super().__init__(temporary, "x+")
        self.path = path

    def write(self, data: "ReadableBuffer", /) -> int:
        with _naming(self.path):
            return super().write(data)


def _create(temporary: str, path: str) -> BinaryIO:
    """Create the temporary file with the permissions of a file that it will replace; errors name `path`."""
    with _naming(path):
        if os.path.basename(path) in ("", os.curdir, os.pardir):  # of which realpath leaves no trace
            code = errno.EISDIR if path else errno.ENOENT
            raise OSError(code, os.strerror(code))
        mode = _mode_of_replaceable(path)
        file = io.BufferedRandom(_Temporary(temporary, path))
    if mode is not None:
        with contextlib.suppress(PermissionError):
            os.chmod(temporary, mode)
    return file


def _mode_of_replaceable(path: str) -> int | None:
    """Return the permissions of an existing file, None without one; OSError if it must not be replaced."""
    try:
        mode = os.stat(path).st_mode  # of /dev/stdout, say, the real path may be no path
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file")
    if not os.access(path, os.W_OK):  # renaming would get around the permissions
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
