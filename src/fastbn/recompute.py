"""Exact statistics of a data set, for layers whose moving ones are stale or approximate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from . import checks
from .errors import must
from .kernels import _channels
from .layer import BatchNorm
from .record import Record


def recompute_statistics(
    layers: BatchNorm | Iterable[BatchNorm],
    batches: Iterable[Any],
    *,
    forward: Callable[[Any], Any] | None = None,
    progress: bool = False,
) -> None:
    """Set moving statistics to those of a whole data set.

    They become the mean, and the variance with the layer's ``ddof``, of all values together that reached the layer, the
    same for any split of the data into batches. The averages over batches that training keeps miss the variance between
    batches, and forget.

    Parameters
    ----------
    layers : BatchNorm or iterable of BatchNorm
        The layers to set. One that is not built is built.
    batches : iterable
        The data, gone through once. Without `forward` they are the arrays that reach the layer, of which there is one.
    forward : callable, optional
        Gets each batch and calls the layers. Meanwhile these normalize with the statistics of the batch, whatever
        ``training`` says: as a whole, without groups, renormalization and adjustment.
    progress : bool, default: False
        Whether to show a progress bar, with tqdm (the extra "cli").

    Raises
    ------
    TypeError
        If an argument has no fitting type, or a batch no fitting dtype.
    ValueError
        If a batch does not fit a layer, a layer keeps no moving statistics, no values reached one, or they are not
        finite and the layer has ``on_nonfinite="raise"``. No moving statistics have changed then.
    ImportError
        If there should be a progress bar and tqdm is not installed.

    Notes
    -----
    The counter ``batches`` of each layer becomes the number of its calls. Several layers learn in one pass, each from
    inputs that earlier ones normalized batch by batch: use batches of the size that training has. No other thread
    should call the layers meanwhile.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> bn = fastbn.BatchNorm(1)
    >>> fastbn.recompute_statistics(bn, [np.array([[1.0], [2.0]]), np.array([[6.0]])])
    >>> bn.moving_mean, bn.moving_variance
    (array([3.], dtype=float32), array([4.6666665], dtype=float32))
    """
    chosen = [layers] if isinstance(layers, BatchNorm) else list(_iterable(layers, "layers"))
    for layer in chosen:
        if not isinstance(layer, BatchNorm):
            raise TypeError(must("layers", "be BatchNorm", type(layer).__name__))
        if not layer.track:
            raise ValueError(must("layers", "keep moving statistics", repr(layer)))
    if not chosen or len({id(layer) for layer in chosen}) != len(chosen):
        raise ValueError(must("layers", "name at least one layer, each once", f"{len(chosen)}"))
    if forward is None and not isinstance(layers, BatchNorm):
        raise ValueError(must("forward", "be given with several layers", "None"))
    if forward is not None and not callable(forward):
        raise TypeError(must("forward", "be callable", type(forward).__name__))
    source = _iterable(batches, "batches")
    if checks.flag(progress, "progress"):
        source = _with_progress(source)

    wanted = [None]
    records = [Record(wanted) for _ in chosen]
    if forward is None:
        for batch in source:
            records[0].add(chosen[0], checks.data(batch, "batches"))
    else:
        try:  # no context manager: Ctrl-C could come between its beginning and the block
            for layer, record in zip(chosen, records):
                layer._record(record)
            for batch in source:
                forward(batch)
        finally:
            wanted.clear()  # for all layers at once: Ctrl-C may end what follows
            for layer in chosen:
                layer._record(None)
    for layer, record in zip(chosen, records):
        if not record.batches:
            raise ValueError(must("batches", "bring values to every layer", f"none for {layer!r}"))
        record.check(layer)
    pairs = [pair for layer, record in zip(chosen, records) for pair in record.updated(layer)]
    with ExitStack() as locked:
        for layer in chosen:
            locked.enter_context(layer._lock)
        _channels.put(pairs, [(layer, record.batches) for layer, record in zip(chosen, records)])


def _iterable(value: Any, name: str) -> Iterable[Any]:
    if hasattr(value, "shape") or not isinstance(value, Iterable):
        raise TypeError(must(name, "be an iterable", type(value).__name__))
    return value


def _with_progress(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install 'fastbn[cli]'") from error
    bar: Iterable[Any] = tqdm(batches, unit="batch")
    return bar
