"""Plain .npz containers: uncompressed, little-endian arrays in C order, read with suspicion.

``numpy.load`` opens them too. Reading here is stricter. Nothing is unpickled or evaluated: a .npy header
has only one valid spelling for these arrays, which a regular expression can check. And no size that a file
claims is believed before it has been held against the size of the file itself.
"""

import contextlib
import errno
import io
import math
import os
import re
import stat
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from .errors import StateError

__all__ = ["NAME", "PlainNpz", "open_npz", "write_npz"]

NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MAX_ENTRIES = 256
# What NumPy writes for these arrays, in every version; only the number of spaces at the end varies.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)"
    rb"\{'descr': '(?P<dtype>[^']{1,8})', 'fortran_order': (?P<fortran>True|False), "
    rb"'shape': \((?P<shape>[0-9, ]{0,200})\), \} *\n",
    re.DOTALL,
)
_NPY_PREAMBLE = 10  # bytes of magic, version and length; the length counts what follows


def write_npz(file: BinaryIO, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write little-endian arrays in C order; equal content gives equal bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, always
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, buffer.getvalue())


@contextlib.contextmanager
def open_npz(path: str | os.PathLike[str]) -> Iterator["PlainNpz"]:
    """Open a container for reading.

    Whatever is wrong with the content becomes a StateError that names the file; that the system does not give
    the file out stays the OSError it is.
    """
    name = os.fspath(path)
    try:
        mode = os.stat(path).st_mode  # before open(), which would wait at a pipe
        if not stat.S_ISREG(mode):
            what = "is a folder" if stat.S_ISDIR(mode) else "is not a regular file"
            raise StateError(f"{name}: {what}")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) != b"PK\x03\x04":
                raise StateError(f"{name}: is not a fastbn state file" if size else f"{name}: is empty")
            with zipfile.ZipFile(file) as archive:
                yield PlainNpz(name, archive, size)
    except (StateError, MemoryError):
        raise
    except OSError as error:
        # A damaged offset makes zipfile seek to before the start, which is EINVAL.
        if error.errno not in (None, errno.EINVAL):
            raise
        raise StateError(f"{name}: is damaged ({error})") from error
    except Exception as error:  # a damaged directory takes zipfile to places that raise almost anything
        raise StateError(f"{name}: is damaged ({error!r})") from error


class PlainNpz:
    """The open container; `names` has been checked, `array` checks and reads one entry."""

    def __init__(self, path: str, archive: zipfile.ZipFile, size: int) -> None:
        self.path = path
        self._archive = archive
        self._entries = self._directory(size)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def fail(self, what: str, cause: Exception | None = None) -> NoReturn:
        raise StateError(f"{self.path}: {what}" + (f" ({cause})" if cause else "")) from cause

    def _directory(self, size: int) -> dict[str, zipfile.ZipInfo]:
        infos = self._archive.infolist()
        if len(infos) > _MAX_ENTRIES:
            self.fail(f"has {len(infos)} entries")
        entries: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            stem, suffix = os.path.splitext(info.filename)
            if info.filename != info.orig_filename or suffix != ".npy" or not NAME.fullmatch(stem):
                self.fail(f"has an unknown entry {info.orig_filename!r}")
            if stem in entries:
                self.fail(f"has two entries {info.filename!r}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                self.fail(f"has a compressed entry {info.filename!r}")
            entries[stem] = info
        # All of them together: entries that share the same bytes would pass one by one.
        if sum(info.file_size for info in infos) > size:
            self.fail("is damaged (its entries are larger than the file)")
        return entries

    def array(self, name: str, dtypes: tuple[str, ...], *, max_bytes: int | None = None) -> NDArray[Any]:
        """Return the array of one entry, read-only."""
        info = self._entries[name]
        if max_bytes is not None and info.file_size > max_bytes:
            self.fail(f"entry {name!r} is larger than {max_bytes} bytes")
        content = self._archive.read(info)  # no larger than the file, and zipfile checks its CRC
        match = _NPY.match(content)
        if match is None or match.end() != _NPY_PREAMBLE + int.from_bytes(match["length"], "little"):
            self.fail(f"entry {name!r} is not a plain .npy array")
        dtype = match["dtype"].decode("ascii", "replace")
        if dtype not in dtypes:
            self.fail(f"entry {name!r} must have dtype {' or '.join(dtypes)}, got {dtype}")
        if match["fortran"] != b"False":
            self.fail(f"entry {name!r} must be in C order")
        shape = tuple(int(part) for part in match["shape"].split(b",") if part.strip())
        expected, found = math.prod(shape) * np.dtype(dtype).itemsize, len(content) - match.end()
        if found != expected:
            self.fail(f"entry {name!r} must hold {expected} bytes, got {found}")
        return np.frombuffer(content, dtype, offset=match.end()).reshape(shape)
