"""Files of the .npy format that are larger than memory: checked headers, and blocks of values.

A file is walked in blocks that are contiguous on disk and of bounded size, whatever its order and wherever
its channel axis lies: leading axes in memory order are walked index by index until what is left can be cut
into ranges that fit. A block therefore holds all channels, a range of them, or one.
"""

from __future__ import annotations

import math
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCK_BYTES", "Block", "NpyFile"]

# Large enough that a block's Python work (about 0.1 ms) vanishes beside reading it (about 10 ms), small
# enough for any machine: applying holds two blocks.
BLOCK_BYTES = 32 << 20
MOST_AXES = 64  # of an array of NumPy's


@dataclass(frozen=True, slots=True)
class Block:
    """A contiguous piece of a file: where it starts, its shape in memory order, and its channels."""

    offset: int
    shape: tuple[int, ...]
    channels: slice


@dataclass(frozen=True, slots=True)
class NpyFile:
    """The header of a .npy file of float32 or float64 values.

    Attributes
    ----------
    path : Path
    shape : tuple of int
    dtype : numpy.dtype
        As stored, so possibly of the other byte order.
    fortran_order : bool
    offset : int
        Where the values start, in bytes.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    offset: int

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> NpyFile:
        """Read and check the header.

        Parameters
        ----------
        path : path-like

        Returns
        -------
        NpyFile

        Raises
        ------
        ValueError
            For a file that is empty, truncated, not .npy, or without axes, and for a pipe or a device.
        TypeError
            For values that are neither float32 nor float64.
        OSError
            For a file that cannot be opened.
        """
        mode = os.stat(path).st_mode  # before open(), which would wait at a pipe
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # open() refuses a folder
            raise ValueError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            shape, fortran_order, dtype = _read_header(file, path)
            offset = file.tell()
        if dtype.newbyteorder("=") not in (np.float32, np.float64):
            raise TypeError(f"{path} must hold float32 or float64 values, got {dtype}")
        # What no array of NumPy's can be is no shape, whether or not there are values.
        size_without_zeros = math.prod(length or 1 for length in shape) * dtype.itemsize
        if any(length < 0 for length in shape) or len(shape) > MOST_AXES or size_without_zeros > sys.maxsize:
            raise ValueError(f"{path} has a damaged .npy header")
        if not shape:
            raise ValueError(f"{path} must hold an array with a channel axis, got a single number")
        needed = offset + math.prod(shape) * dtype.itemsize
        if size < needed:
            raise ValueError(f"{path} is truncated: {size} bytes of the {needed} that its header promises")
        return cls(Path(path), shape, dtype, fortran_order, offset)

    @property
    def nbytes(self) -> int:
        """Bytes of values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """The axes from the slowest to the fastest."""
        return self.shape[::-1] if self.fortran_order else self.shape

    def channel_axis(self, axis: int) -> int:
        """Check `axis` and turn it into an index of `memory_shape`."""
        rank = len(self.shape)
        if not -rank <= axis < rank:
            raise ValueError(
                f"axis must lie in [{-rank}, {rank - 1}] for {self.path} of shape {self.shape}, got {axis}"
            )
        return rank - 1 - axis % rank if self.fortran_order else axis % rank

    def blocks(self, axis: int, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
        """Cut the file into blocks, in the order in which they are stored."""
        shape, channel = self.memory_shape, self.channel_axis(axis)
        if 0 in shape:
            return
        # `cut` is the first axis whose single entries fit into a block: the axes before it are walked one
        # by one.
        cut, entry = 0, math.prod(shape[1:]) * self.dtype.itemsize
        while entry > block_bytes and cut < len(shape) - 1:
            cut += 1
            entry //= shape[cut]
        step = max(1, block_bytes // entry)
        offset = self.offset
        for index in product(*map(range, shape[:cut])):
            for start in range(0, shape[cut], step):
                stop = min(start + step, shape[cut])
                if channel < cut:
                    channels = slice(index[channel], index[channel] + 1)
                elif channel == cut:
                    channels = slice(start, stop)
                else:
                    channels = slice(0, shape[channel])
                yield Block(offset, (1,) * cut + (stop - start,) + shape[cut + 1 :], channels)
                offset += (stop - start) * entry

    def read(self, file: IO[bytes], block: Block) -> NDArray[Any]:
        """Map one block of the opened file, in native byte order."""
        try:
            window = np.memmap(file, dtype=self.dtype, mode="r", offset=block.offset, shape=block.shape)
        except ValueError as error:  # of mmap, which does not know the name
            raise ValueError(f"{self.path} became shorter while it was read") from error
        return np.asarray(window).astype(self.dtype.newbyteorder("="), copy=False)


def _read_header(file: IO[bytes], path: str | os.PathLike[str]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    start = file.read(len(np.lib.format.MAGIC_PREFIX))
    file.seek(0)
    if not start:
        raise ValueError(f"{path} is empty")
    if start.startswith(b"PK"):
        raise ValueError(f"{path} must be a .npy file, got an archive (.npz?): save its array with numpy.save")
    if not np.lib.format.MAGIC_PREFIX.startswith(start):
        raise ValueError(f"{path} is not a .npy file")
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(file)
    except OSError:
        raise
    except Exception as error:  # a damaged header takes NumPy and its tokenizer to places that raise almost anything
        raise ValueError(f"{path} has a damaged .npy header") from error
    # Version 3 exists for field names beyond Latin-1, which plain numbers do not have.
    raise ValueError(f"{path} has .npy version {version}, expected 1.0 or 2.0")
