"""Batch norm over MPI: statistics and gradients of the batches of all ranks together.

Needs mpi4py and an MPI library: ``pip install "fastbn[mpi]"``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import checks, layer, passes, synchronized
from . import layout as layouts
from . import weights as weighting
from .composite import Batch, refuse_nonfinite
from .errors import must
from .moments import Moments

Array = NDArray[Any]

__all__ = ["BatchNorm", "Communicator"]


class Communicator(Protocol):
    """What `BatchNorm` uses of a communicator: mpi4py's, or anything that has these."""

    def Get_size(self) -> int:
        """Return the number of ranks."""

    def Allgather(self, sendbuf: Any, recvbuf: Any) -> None:
        """Fill the rows of recvbuf, float64 of shape (ranks, n), with the n numbers that each rank sends, by rank."""


class _Pooled(NamedTuple):
    """What the gradient needs: the cache of this rank's part, the values per channel of all parts, and p and q."""

    cache: passes.Cache
    values: weighting.Count
    correction: tuple[Array, Array] | None


class BatchNorm(layer.BatchNorm):
    """`fastbn.BatchNorm` whose batch is spread over the ranks of a communicator.

    In training all ranks call the layer together, each with its part of the batch, in the same order of layers. Every
    rank sends count, mean and sum of squares of its part, and merges those of all ranks in rank order: so all have the
    same statistics to the bit, and the same moving statistics. Parts may differ in size, and be empty. Inference sends
    nothing.

    Parameters
    ----------
    num_features
        As of `fastbn.BatchNorm`, and so are all other parameters but comm.
    comm : communicator, optional
        By default ``mpi4py.MPI.COMM_WORLD``. Anything with ``Get_size()`` and ``Allgather(sendbuf, recvbuf)`` will do.
    **options
        Of `fastbn.BatchNorm`, but for virtual_batch_size and adjustment.

    Notes
    -----
    A mask, weights or ``nan_policy="omit"`` cost one more exchange, of a number per channel.

    `backward` gives the gradient of x through the statistics of the whole batch. The gradients of gamma and beta in
    `grads` are this rank's share: add them up over the ranks, with those of all other parameters of the model.

    A rank whose arguments do not fit raises, and so do the others: a built layer tells them before. With
    ``on_nonfinite="raise"`` all ranks raise, since all have the same statistics.

    `fastbn.recompute_statistics` goes through all ranks if it is given ``forward`` (``forward=bn`` for one layer).

    Pickles, copies and files hold no communicator; what is loaded has the default one, or that given to `comm`.

    Examples
    --------
    ::

        # mpiexec -n 2 python program.py
        from mpi4py import MPI
        import numpy as np
        import fastbn.mpi

        bn = fastbn.mpi.BatchNorm(64, comm=MPI.COMM_WORLD)
        x = np.random.default_rng(MPI.COMM_WORLD.Get_rank()).normal(size=(32, 64)).astype(np.float32)
        y = bn(x, training=True)  # normalized with the statistics of all 64 rows
        dx = bn.backward(y)
    """

    _comm: Communicator | None = None

    def __init__(
        self, num_features: int | tuple[int, ...] | None = None, *, comm: Communicator | None = None, **options: Any
    ) -> None:
        super().__init__(num_features, **options)
        for name in ("virtual_batch_size", "adjustment"):
            value = getattr(self, name)
            if value is not None:
                raise ValueError(must(name, "not be given where the batch is that of all ranks", repr(value)))
        self.comm = comm

    @property
    def comm(self) -> Communicator:
        """The communicator."""
        comm = self._comm
        if comm is None:
            comm = self._comm = _world()
        return comm

    @comm.setter
    def comm(self, value: Communicator | None) -> None:
        if value is not None and not all(callable(getattr(value, n, None)) for n in ("Get_size", "Allgather")):
            raise TypeError(must("comm", "have Get_size() and Allgather(sendbuf, recvbuf)", type(value).__name__))
        self._comm = value

    def _gather(self, row: Array) -> Array:
        rows = np.empty((self.comm.Get_size(), row.size))
        self.comm.Allgather(row, rows)
        return rows

    def __call__(
        self,
        x: ArrayLike,
        training: bool | None = None,
        *,
        residual: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        out: Array | None = None,
    ) -> Array:
        """Normalize this rank's part of a batch.

        Parameters
        ----------
        x, training, residual, out
            As of `fastbn.BatchNorm`. All ranks must agree about training.
        mask, sample_weight
            As of `fastbn.BatchNorm`, of this rank's part. Ranks need not agree: without, every value counts once.

        Returns
        -------
        ndarray
            This rank's part of y.

        Raises
        ------
        TypeError, ValueError
            As of `fastbn.BatchNorm`; nothing has changed then.
        RuntimeError
            If another rank has raised.
        """
        mode, recorder = self.mode(training), self._recorder
        if mode == "inference" and recorder is None:
            return super().__call__(x, training, residual=residual, mask=mask, sample_weight=sample_weight, out=out)
        arrays = self._arrays
        learns = mode == "train" and recorder is None
        corrected: list[tuple[Array, Array]] = []
        renorm = self._renorm if learns else None
        if renorm is not None:
            if arrays is None:
                arrays = self._created(*_features_of(checks.data(x, "x"), self.axis, self.layout))
            with self._lock:
                before = {name: array.copy() for name, array in arrays.extra.items()}

        def correction(pooled: Moments, statistics: passes.Statistics) -> tuple[Array, Array]:
            assert renorm is not None
            with np.errstate(all="ignore"):
                p, q = renorm.correction(before, statistics, self.epsilon)
            counted = np.greater(pooled.count, 0)
            corrected.append((np.where(counted, p, 1.0), np.where(counted, q, 0.0)))
            return corrected[0]

        def check(pooled: Moments) -> None:
            """Raise where statistics are not finite, on all ranks alike."""
            if arrays is None or arrays.moving_mean is None:
                dtype = checks.parameter_dtype(checks.data(x, "x").dtype)
            else:
                dtype = arrays.moving_mean.dtype
            found = passes.Statistics(pooled.mean, pooled.variance(self.ddof))
            refuse_nonfinite(found, np.greater(pooled.count, 0), dtype)

        def refuse(x: Array, y: Array | None) -> None:
            """Raise, before anything is sent, where this rank could not write what it has to."""
            if arrays is not None and y is not None:
                checks.apart(y, "out", **self._named(arrays))
            if arrays is not None and learns:
                self._refuse_unfit(arrays, x)

        y, cache, pooled = synchronized.forward(
            x,
            self._gather,
            gamma=None if arrays is None else arrays.gamma,
            beta=None if arrays is None else arrays.beta,
            epsilon=self.epsilon,
            axis=self.axis,
            layout=self.layout,
            activation=self.activation,
            residual=residual,
            out=out,
            channels=None if arrays is None else math.prod(arrays.shape),
            check=check if learns and self.on_nonfinite == "raise" else None,
            mask=mask,
            sample_weight=sample_weight,
            nan_policy=self.nan_policy,
            correction=None if renorm is None else correction,
            refuse=refuse,
        )
        assert cache is not None
        if arrays is None:
            arrays = self._created(*_features_of(checks.data(x, "x"), self.axis, self.layout))
        # A channel in which nothing counts has an infinite variance, as everywhere, and keeps its averages.
        variance = np.where(np.greater(pooled.count, 0), pooled.variance(self.ddof), np.inf)
        batch = Batch(cache.statistics, variance, pooled.count)
        counts = np.any(batch.counted)
        with self._lock:
            arrays = self._adopted(arrays)
            if counts and recorder is not None:
                recorder.take(checks.data(x, "x"), arrays.shape, batch)
            elif counts and learns and self._direct:
                self._learn_plainly(arrays, cache.statistics, pooled.count)
            elif counts and learns:
                with np.errstate(all="ignore"):  # of averages of infinite and NaN
                    self._learn(arrays, batch)
        self._last.cache = _Pooled(cache, pooled.count, corrected[0] if corrected else None)
        return y

    def backward(self, dy: ArrayLike, *, out: Array | None = None) -> Array:
        """Return the gradient of this thread's last call, and set `grads`.

        After training all ranks call it together.

        Parameters
        ----------
        dy, out
            As of `fastbn.BatchNorm`.

        Returns
        -------
        ndarray
            dx of this rank's part, through the statistics of the whole batch.

        Raises
        ------
        TypeError, ValueError
            As of `fastbn.BatchNorm`.
        RuntimeError
            If another rank has raised.
        """
        last = getattr(self._last, "cache", None)
        if type(last) is not _Pooled:
            return super().backward(dy, out=out)
        dx, dgamma, dbeta, *others = synchronized.backward(dy, last.cache, self._gather, last.values, out=out)
        if last.correction is not None:
            p, q = (values.reshape(dgamma.shape) for values in last.correction)
            dgamma = (p * dgamma + q * dbeta).astype(dgamma.dtype)
        self.grads = {}
        if self.scale:
            self.grads["gamma"] = dgamma
        if self.center:
            self.grads["beta"] = dbeta
        if others:
            self.grads["residual"] = others[0]
        return dx


def _features_of(x: Array, axis: Any, layout: str | None) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return what a layer is built with by its first batch: the shape and the type of its parameters."""
    shape = layouts.channel_shape(x.shape, layouts.channel_axes(axis, layout, x.ndim))
    return shape, np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def _world() -> Communicator:
    """Return the default communicator."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        needs = 'mpi4py (pip install "fastbn[mpi]") and an MPI library (Debian: apt-get install openmpi-bin)'
        raise ImportError(f"fastbn.mpi needs {needs}: {error}") from error
    world: Communicator = MPI.COMM_WORLD
    return world
