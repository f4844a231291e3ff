"""What the scaler of `fastbn.sklearn` does with its statistics: `transform`, its inverse, a layer like it."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn import config_context, get_config
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils import assert_all_finite, check_array
from sklearn.utils.sparsefuncs import inplace_column_scale
from sklearn.utils.validation import check_is_fitted, validate_data

from . import kernels, passes
from . import layout as layouts
from .errors import must
from .layer import BatchNorm
from .moments import moments
from .running import Running, finite

Array = NDArray[Any]

DTYPES: Final = [np.float64, np.float32, np.float16]
# Columns that stay small, by what pandas, polars and Arrow call their types.
SMALL: Final = dict.fromkeys(("float32", "Float32", "float[pyarrow]"), np.float32) | dict.fromkeys(
    ("float16", "Float16", "halffloat[pyarrow]"), np.float16
)


class Scaling(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """The part of `BatchNormScaler` that learns nothing."""

    copy: bool
    with_mean: bool
    with_std: bool
    gamma: ArrayLike | None
    beta: ArrayLike | None
    n_features_in_: int
    _running: Running

    def transform(self, X: ArrayLike, copy: bool | None = None) -> Any:
        """Standardize X.

        Parameters
        ----------
        X : array_like or CSR or CSC matrix of shape (n_samples, n_features)
            The data.
        copy : bool, optional
            In place of the scaler's own copy.

        Returns
        -------
        ndarray or sparse matrix of shape (n_samples, n_features)
            float32 and float16 stay what they are; else float64.

        Raises
        ------
        ValueError
            If with_mean or with_std is True, and `mean_` or `scale_` is None or has another number of features.
        """
        copy = self.copy if copy is None else copy
        table = self._table(X, copy, reset=False)
        features = table.shape[1]
        gamma, beta = self._range(features)
        deviation = self._learned("scale_", "with_std", features)
        scale = gamma if deviation is None else gamma / deviation
        if sparse.issparse(table):
            return self._scale_sparse(table, scale)
        mean = self._learned("mean_", "with_mean", features)
        if mean is None:
            return self._apply(table, copy, None, scale, beta)
        return self._apply(table, copy, mean, scale, beta - self._rest(mean) * scale)

    def inverse_transform(self, X: ArrayLike, copy: bool | None = None) -> Any:
        """Undo `transform`.

        Parameters
        ----------
        X : array_like or CSR or CSC matrix of shape (n_samples, n_features)
            Standardized data.
        copy : bool, optional
            In place of the scaler's own copy.

        Returns
        -------
        ndarray or sparse matrix of shape (n_samples, n_features)
            In the original units; float32 and float16 stay what they are, else float64.

        Raises
        ------
        ValueError
            If a gamma is 0, or as in `transform`.
        """
        copy = self.copy if copy is None else copy
        table = self._table(X, copy, names=False)
        features = getattr(self, "n_features_in_", table.shape[1])
        if table.shape[1] != features:
            raise ValueError(must("X", f"have {features} features", table.shape[1]))
        gamma, beta = self._range(features)
        if not gamma.all():
            raise ValueError(must("gamma", "have no zeros in inverse_transform", f"one in feature {gamma.argmin()}"))
        deviation = self._learned("scale_", "with_std", features)
        scale = 1 / gamma if deviation is None else deviation / gamma
        if sparse.issparse(table):
            return self._scale_sparse(table, scale)
        mean = self._learned("mean_", "with_mean", features)
        if mean is None:
            mean = np.zeros(features)
        if not beta.any():
            return self._apply(table, copy, None, scale, mean)
        return self._apply(table, copy, beta, scale, mean)

    def to_batch_norm(self, dtype: str = "float64") -> BatchNorm:
        """Return a layer whose inference is `transform`: to fold into the next layer, or to export.

        Parameters
        ----------
        dtype : {"float32", "float64"}, default: "float64"
            Of the layer's arrays; results are of the type of its input. In float32 a mean is rounded.

        Returns
        -------
        fastbn.BatchNorm
            With epsilon 0 and ``scale_ ** 2`` for the variance; where that leaves the range of dtype, with variance 1
            and a gamma that is divided by ``scale_``.
        """
        check_is_fitted(self)
        features = self.n_features_in_
        gamma, beta = self._range(features)
        mean, deviation = self._learned("mean_", "with_mean", features), self._learned("scale_", "with_std", features)
        layer = BatchNorm(features, epsilon=0.0, dtype=dtype)
        variance = np.ones(features)
        if deviation is not None:
            limits = np.finfo(layer.moving_variance.dtype)
            with np.errstate(all="ignore"):
                variance = deviation**2
                beyond = (variance < limits.tiny) | (variance > limits.max)
                gamma, variance = np.where(beyond, gamma / deviation, gamma), np.where(beyond, 1.0, variance)
        layer.load_state_dict(
            {
                "gamma": gamma,
                "beta": beta,
                "moving_mean": np.zeros(features) if mean is None else mean,
                "moving_variance": variance,
                "batches": 1,
            }
        )
        return layer

    def _learned(self, name: str, switch: str, features: int) -> Array | None:
        """Return `mean_` or `scale_`, which may have been set by hand; None where the parameter turns it off."""
        if not getattr(self, switch):
            return None
        value = getattr(self, name, None)
        shape = None if value is None else np.shape(value)
        if shape != (features,):
            raise ValueError(must(name, f"have shape ({features},) where {switch} is True", shape))
        return np.ascontiguousarray(value, np.float64)

    def _rest(self, mean: Array) -> Array:
        """Return what the rounding of `mean_` left over: nothing where it was set by hand."""
        if not hasattr(self, "_running"):
            return np.zeros(len(mean))
        rest: Array = self._running.low * (mean == self._running.mean)
        return rest

    def _table(self, X: Any, copy: bool, **options: Any) -> Any:
        """Return X as `_validated` does. It copies only what will be overwritten and must not be."""
        if self._fits(X, writes=not copy):
            return X
        check_is_fitted(self)
        is_sparse = sparse.issparse(X)
        return self._validated(
            X,
            copy=copy and is_sparse,
            force_writeable=is_sparse or not copy,
            ensure_all_finite="allow-nan" if is_sparse else False,
            **options,
        )

    def _scale_sparse(self, table: Any, scale: Array) -> Any:
        self._refuse_centering(table)
        if (scale != 1).any():
            inplace_column_scale(table, scale)
        return table

    def _apply(self, table: Array, copy: bool, mean: Array | None, scale: Array, shift: Array) -> Array:
        """Return (table - mean) * scale + shift, having looked for infinite values."""
        # Statistics that are finite show that all values are, or with "omit" all that are not NaN.
        if not (
            get_config()["assume_finite"]
            or finite(moments(table)).all()
            or finite(moments(table, nan_policy="omit")).all()
        ):
            self._check_finite(table)
        y: Array = layouts.like(table, table.dtype) if copy else table
        out = y
        if table.dtype != np.float64 and not _fit_float32(scale):  # the type of kernels' coefficients
            table = out = table.astype(np.float64)
        passes.run(
            kernels.NORMALIZE,
            (1,),
            table,
            out=out,
            mean=mean,
            gamma=np.ascontiguousarray(scale),
            beta=np.ascontiguousarray(shift),
        )
        if out is not y:
            with np.errstate(all="ignore"):
                y[...] = out
        return y

    # -- checks ------------------------------------------------------------------------------------------------------

    def _fits(self, X: Any, *, writes: bool = False) -> bool:
        """Whether X is an array like those that were seen, of which `validate_data` would find nothing to say.

        It takes 0.2 ms where the caches are full of data: a sixth of a transform of 4 million values.
        """
        return (
            type(X) is np.ndarray
            and X.ndim == 2
            and X.dtype in DTYPES
            and len(X) > 0
            and hasattr(self, "_running")
            and X.shape[1] == self.n_features_in_
            and not hasattr(self, "feature_names_in_")
            and (X.flags.writeable or not writes)
        )

    def _validated(self, X: Any, *, names: bool = True, **options: Any) -> Any:
        """Return X as scikit-learn's checks let it through: an array, or a CSR or CSC matrix."""
        options |= {"accept_sparse": ("csr", "csc"), "dtype": dtypes(X)}
        with config_context(array_api_dispatch=False):  # which would keep arrays that kernels cannot read
            return validate_data(self, X, **options) if names else check_array(X, estimator=self, **options)

    def _refuse_centering(self, table: Any) -> None:
        if not sparse.issparse(table):
            return
        if self.with_mean:
            raise ValueError("Cannot center sparse matrices: pass `with_mean=False` instead.")
        if self.beta is not None and np.any(self.beta):
            raise ValueError(must("beta", "be None or 0 for sparse data", repr(self.beta)))

    def _range(self, features: int) -> tuple[Array, Array]:
        """Return gamma and beta per feature."""
        result = []
        for name, default in (("gamma", 1.0), ("beta", 0.0)):
            given = getattr(self, name)
            if given is None:
                result.append(np.full(features, default))
                continue
            value = np.asarray(given)
            if value.dtype.kind == "c":  # of which only the real part would count
                raise TypeError(must(name, "have a real dtype", value.dtype))
            value = value.astype(np.float64)
            if value.shape not in ((), (features,)):
                raise ValueError(must(name, f"be a number or have shape ({features},)", value.shape))
            if not np.isfinite(value).all():
                raise ValueError(must(name, "be finite", repr(given)))
            result.append(np.broadcast_to(value, (features,)))
        return result[0], result[1]

    def _check_finite(self, values: Array) -> None:
        assert_all_finite(values, allow_nan=True, estimator_name=type(self).__name__, input_name="X")


def dtypes(X: Any) -> Any:
    """Return the dtypes that data may have.

    Frames of polars, Arrow's columns and arrays of other libraries scikit-learn would make float64 whatever they hold.
    """
    dtypes = getattr(X, "dtypes", None)
    if dtypes is not None and np.ndim(dtypes) == 1:
        names = {str(t) for t in dtypes}
        return np.result_type(*map(SMALL.get, names)) if names and names <= SMALL.keys() else DTYPES
    if hasattr(X, "__dlpack__") and not isinstance(X, np.ndarray):
        name = str(X.dtype).rpartition(".")[2]  # torch.float32
        return next((t for t in DTYPES if np.dtype(t).name == name), DTYPES)
    return DTYPES


def _fit_float32(values: Array) -> bool:
    """Whether float32 has a place for values, with all of its digits."""
    size, limits = np.abs(values[values != 0]), np.finfo(np.float32)
    return not ((size < limits.tiny) | (size > limits.max)).any()
