"""Ghost batches: a training batch is normalized in groups of rows, each by its own statistics."""

from __future__ import annotations

from typing import Final

from .errors import must

KINDS: Final = ("contiguous", "strided")


def groups(rows: int, size: int, kind: str, allow_incomplete: bool) -> list[slice]:
    """Return the rows of each group, as slices of the first axis.

    Parameters
    ----------
    rows : int
        Rows of the batch.
    size : int
        Rows of a group, V.
    kind : {"contiguous", "strided"}
        Group g of G holds the rows gV to gV + V - 1, or, as TensorFlow has it, g, g + G, g + 2G and so on.
    allow_incomplete : bool
        Whether the rows that are left over may be a last group.

    Returns
    -------
    list of slices
        Every row once. An empty batch is one empty group.

    Raises
    ------
    ValueError
        If rows are left over that must not be.
    """
    count, rest = divmod(rows, size)
    if rest and not allow_incomplete:
        raise ValueError(
            must("x", f"have a multiple of virtual_batch_size={size} rows, or allow_incomplete=True be set", rows)
        )
    full = count * size
    if kind == "strided":
        parts = [slice(g, full, count) for g in range(count)]
    else:
        parts = [slice(g * size, (g + 1) * size) for g in range(count)]
    return [*parts, slice(full, rows)] if rest or not parts else parts
