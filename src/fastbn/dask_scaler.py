"""BatchNormScaler for Dask arrays and data frames: `fastbn.dask.BatchNormScaler`."""

from __future__ import annotations

from typing import Any, Final, Self

import dask
import dask.array as da
import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn import config_context
from sklearn.base import clone
from sklearn.utils import check_array
from sklearn.utils.validation import _get_feature_names, check_is_fitted, validate_data

from . import sklearn as local
from .errors import must
from .running import Running
from .scaling import dtypes

Array = NDArray[Any]

MERGED: Final = 8  # parts that are merged at a time


class BatchNormScaler(local.BatchNormScaler):
    """`fastbn.sklearn.BatchNormScaler` for data that live in blocks: Dask arrays and data frames.

    `fit` and `partial_fit` find the statistics of all blocks on the workers, merge them in a tree and wait for the
    result; `transform` and `inverse_transform` are lazy, and work block by block. Other data go the way of the base
    class. Parameters, attributes and results are those of `fastbn.sklearn.BatchNormScaler`.

    Notes
    -----
    Chunk sizes may be unknown and blocks may be empty. Chunks that cut the feature axis are put together first.
    Infinite values raise when their block is computed. With ``with_mean=False`` blocks may be sparse. Frames may have
    columns of any real type, nullable and of Arrow too; their results have the type that the base class gives them.

    What `transform` makes of a Dask collection is one of the same kind; `set_output` is for other data.

    Examples
    --------
    >>> import dask.array as da
    >>> from fastbn.dask import BatchNormScaler
    >>> x = da.random.default_rng(0).normal(5, 2, (1000, 3), chunks=(100, 3))
    >>> z = BatchNormScaler().fit(x).transform(x)
    >>> bool(abs(z.std(axis=0).compute() - 1).max() < 1e-12)
    True
    """

    def fit(self, X: Any, y: object = None, sample_weight: Any = None) -> Self:
        """Find mean and deviation of X; see the base class."""
        if not dask.is_dask_collection(X):
            super().fit(X, y, sample_weight)
            return self
        new: Any = clone(self)
        new.partial_fit(X, y, sample_weight)
        for name in _learned(self):
            delattr(self, name)
        for name in _learned(new):
            setattr(self, name, getattr(new, name))
        return self

    def partial_fit(self, X: Any, y: object = None, sample_weight: Any = None) -> Self:
        """Add all blocks to what was seen before; see the base class."""
        if not dask.is_dask_collection(X):
            super().partial_fit(X, y, sample_weight)
            return self
        self._check_parameters()
        table, names = _table(X)
        features = table.shape[1]
        if features == 0:
            raise ValueError(must("X", "have at least one feature", f"shape {table.shape}"))
        if table.shape[0] == 0:
            raise ValueError(must("X", "have at least one sample", f"shape {table.shape}"))
        self._range(features)
        if hasattr(self, "_running"):
            self._check_features(X, table, names)
        blocks = table.to_delayed().reshape(-1)
        weights: list[Any] = [None] * len(blocks)
        weighed: Any = True
        if sample_weight is not None:
            weights = list(_weights(sample_weight, table).to_delayed().reshape(-1))
            weighed = dask.delayed(any)([dask.delayed(np.any)(weight) for weight in weights])
        part = dask.delayed(_part, pure=False)
        scaler = local.BatchNormScaler(**self.get_params())
        parts = [part(block, weight, scaler) for block, weight in zip(blocks, weights, strict=True)]
        while len(parts) > 1:
            parts = [dask.delayed(_merge)(parts[i : i + MERGED]) for i in range(0, len(parts), MERGED)]
        total, weighed = dask.compute(*parts, weighed)
        if total is None:  # of a length that was not known
            raise ValueError(must("X", "have at least one sample", f"shape {(0, features)}"))
        if not weighed:
            raise ValueError("Sample weights must contain at least one non-zero number.")
        self.n_features_in_ = features
        if names is not None:
            self.feature_names_in_ = names
        self._add(total, weighted=sample_weight is not None)
        return self

    def fit_transform(self, X: Any, y: object = None, **fit_params: Any) -> Any:
        """Fit to X and standardize it, lazily if it is lazy; see the base class."""
        if not dask.is_dask_collection(X):
            return super().fit_transform(X, y, **fit_params)
        return self.fit(X, y, **fit_params).transform(X)

    def transform(self, X: Any, copy: bool | None = None) -> Any:
        """Standardize X, lazily if it is lazy; see the base class. Blocks are never overwritten."""
        if not dask.is_dask_collection(X):
            return super().transform(X, copy)
        return self._by_block(X, "transform")

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Any:
        """Undo `transform`, lazily if X is lazy; see the base class."""
        if not dask.is_dask_collection(X):
            return super().inverse_transform(X, copy)
        return self._by_block(X, "inverse_transform")

    def _by_block(self, X: Any, method: str) -> Any:
        check_is_fitted(self)
        table, names = _table(X)
        self._check_features(X, table, names)
        scaler = local.BatchNormScaler(**(self.get_params() | {"copy": True}))
        left_out = {*scaler.get_params(), "feature_names_in_", "_sklearn_output_config"}
        state = {n: v for n, v in vars(self).items() if n not in left_out}
        scaler.__dict__.update(state)
        if hasattr(X, "map_partitions") and hasattr(X, "columns"):
            meta = _result_frame(X._meta, scaler, method)
            return X.map_partitions(_result_frame, scaler, method, meta=meta)
        dtype = table.dtype if table.dtype in (np.float16, np.float32) else np.dtype(np.float64)
        return table.map_blocks(_result, scaler, method, dtype=dtype, meta=np.empty((0, 0), dtype))

    def _check_features(self, X: Any, table: Any, names: Array | None) -> None:
        if table.shape[1] != self.n_features_in_:
            raise ValueError(must("X", f"have {self.n_features_in_} features", table.shape[1]))
        ours = getattr(self, "feature_names_in_", None)
        if names is not None and ours is not None and list(names) != list(ours):
            raise ValueError(must("X", f"have the feature names {list(ours)}", list(names)))
        if (names is None) != (ours is None):  # scikit-learn warns
            like = np.empty((0, table.shape[1])) if names is None else X._meta
            validate_data(self, like, reset=False, skip_check_array=True)


# scikit-learn has wrapped these for `set_output`, which would take a lazy result for data. Data in memory go through
# those of the base class, which are wrapped.
for _name in ("fit_transform", "transform"):
    setattr(BatchNormScaler, _name, vars(BatchNormScaler)[_name].__wrapped__)


def _learned(scaler: Any) -> list[str]:
    """Return the names of what a scaler has learned."""
    return [n for n in vars(scaler) if n.endswith("_") or n in ("_running", "_seen", "_weighted")]


def _table(X: Any) -> tuple[Any, Array | None]:
    """Return a Dask array with whole rows, and the names of its columns if they are strings."""
    names = None
    if hasattr(getattr(X, "_meta", None), "columns"):
        names = _get_feature_names(X._meta)
        for dtype in X.dtypes:
            if dtype.kind not in "fiub":
                raise TypeError(must("X", "have a real dtype", dtype))
        X = X.map_partitions(_values, meta=_values(X._meta))
    if not isinstance(X, da.Array):
        raise TypeError(must("X", "be a dask array or data frame", type(X).__name__))
    if X.ndim != 2:
        raise ValueError(must("X", "have two dimensions", f"shape {X.shape}"))
    if X.dtype.kind not in "fiub":
        raise TypeError(must("X", "have a real dtype", X.dtype))
    if np.isnan(X.shape[1]):
        raise ValueError(must("X", "have a known number of features", "unknown chunk sizes along axis 1"))
    return (X.rechunk({1: -1}) if X.numblocks[1] > 1 else X), names


def _weights(sample_weight: Any, table: Any) -> Any:
    """Return the weights in the same chunks as the rows."""
    if not isinstance(sample_weight, da.Array):
        if hasattr(sample_weight, "to_dask_array"):
            sample_weight = sample_weight.to_dask_array()
        elif np.isnan(table.shape[0]):
            raise ValueError(must("sample_weight", "be a dask array where chunk sizes are unknown", "another"))
        else:
            sample_weight = da.from_array(np.asarray(sample_weight))
    if sample_weight.dtype.kind == "c":
        raise TypeError(must("sample_weight", "have a real dtype", sample_weight.dtype))
    known = not np.isnan(table.shape[0]) and not np.isnan(sample_weight.shape).any()
    if sample_weight.ndim != 1 or (known and sample_weight.shape != table.shape[:1]):
        raise ValueError(must("sample_weight", f"have shape ({table.shape[0]},)", sample_weight.shape))
    if known:
        return sample_weight.rechunk((table.chunks[0],))
    if sample_weight.numblocks[0] != table.numblocks[0]:
        raise ValueError(must("sample_weight", f"have {table.numblocks[0]} chunks", sample_weight.numblocks[0]))
    return sample_weight


def _floating(block: Any) -> Any:
    if sparse.issparse(block):
        form = block if block.format in ("csr", "csc") else block.tocsr()
        return form if form.dtype in (np.float32, np.float64) else form.astype(np.float64)
    array = np.asarray(block)
    return array if array.dtype in (np.float16, np.float32, np.float64) else array.astype(np.float64)


def _values(frame: Any) -> Array:
    """Return the values of a frame in the type that the base class gives them, and NaN for what is missing."""
    options = {"ensure_all_finite": False, "ensure_min_samples": 0, "ensure_min_features": 0}
    values: Array = check_array(frame, dtype=dtypes(frame), **options)
    return values


def _part(block: Any, weight: Any, scaler: local.BatchNormScaler) -> Running | None:
    """Return the statistics of one block, as the base class finds them; None of a block without rows."""
    table = _floating(block)
    scaler._refuse_centering(table)
    if weight is not None:
        weight = np.asarray(weight, np.float64)
        if weight.shape != table.shape[:1]:
            raise ValueError(must("sample_weight", f"have {table.shape[0]} values in this chunk", len(weight)))
        if not (np.isfinite(weight).all() and (weight >= 0).all()):
            raise ValueError(must("sample_weight", "be finite and not negative", "other values"))
    return scaler._statistics(table, weight) if table.shape[0] else None


def _merge(parts: list[Running | None]) -> Running | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    total = present[0].copy()
    for part in present[1:]:
        total.merge(part)
    return total


def _result(block: Any, scaler: Any, method: str) -> Any:
    table = _floating(block)
    if not table.shape[0]:
        return table
    with config_context(transform_output="default"):
        return getattr(scaler, method)(table)


def _result_frame(frame: Any, scaler: Any, method: str) -> Any:
    return type(frame)(_result(_values(frame), scaler, method), index=frame.index, columns=frame.columns)
