"""A scaler for scikit-learn: StandardScaler's results, in one pass over memory, in the type of the data, mergeable.

Needs scikit-learn 1.6 or newer: ``pip install "fastbn[sklearn]"``.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    from scipy import sparse
    from sklearn import config_context, get_config
    from sklearn.base import clone
    from sklearn.utils._param_validation import Interval
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted

    from .scaling import Scaling
except ImportError as error:  # pragma: no cover - depends on what is installed
    raise ImportError('fastbn.sklearn needs scikit-learn 1.6 or newer: pip install "fastbn[sklearn]"') from error

from .errors import must
from .moments import Moments
from .running import Running, of_sparse

Array = NDArray[Any]


class _NoCallbacks:
    """What stands in for scikit-learn's callbacks where it has none yet (before 1.9)."""


def _undecorated(method: Callable[..., Any]) -> Callable[..., Any]:
    return method


try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # pragma: no cover - depends on what is installed
    CallbackSupportMixin, with_callbacks = _NoCallbacks, _undecorated

__all__ = ["BatchNormScaler"]


class BatchNormScaler(CallbackSupportMixin, Scaling):  # type: ignore[misc, unused-ignore]
    """Standardize features, like scikit-learn's StandardScaler, in one pass and in the type of the data.

    ::

        z = (x - mean) / sqrt(variance + epsilon) * gamma + beta

    With its defaults it takes the place of StandardScaler: the same arguments, attributes and results, to rounding.

    Parameters
    ----------
    copy : bool, default: True
        If False, `transform` writes into X where it can.
    with_mean : bool, default: True
        Whether to subtract the mean. Sparse data need False.
    with_std : bool, default: True
        Whether to divide by the deviation.
    epsilon : float, default: 0.0
        Added to the variance. With 0, columns that are constant up to rounding (StandardScaler's rule) have scale 1.
    momentum : float in [0, 1], optional
        For streams that drift: at each `partial_fit`, what was seen before counts this many times as much, the batch
        by its number of samples. Features of which a batch has no values stay as they are. None, as 1, forgets
        nothing.
    gamma, beta : float or array_like of shape (n_features,), optional
        Scale and shift of the result, so its deviation and its mean; 1 and 0 where None.

    Attributes
    ----------
    mean_ : ndarray of shape (n_features,) or None
        Mean of each feature; None if with_mean and with_std are False.
    var_ : ndarray of shape (n_features,) or None
        Variance (ddof 0); None if with_std is False.
    scale_ : ndarray of shape (n_features,) or None
        What features are divided by; None if with_std is False.
    n_samples_seen_ : int, float or ndarray of shape (n_features,)
        Samples, or the sum of their weights; one number if it is the same for all features.
    n_features_in_ : int
        Number of features.
    feature_names_in_ : ndarray of shape (n_features,)
        Names of features, where X has names that are strings.

    Notes
    -----
    NaN is a missing value: left out in `fit`, kept in `transform`. Infinity is an error; `fit` notices it in the
    statistics, without a pass of its own, and `transform` reads X twice for it.

    float32 and float16 stay what they are; everything else becomes float64. Statistics are float64, and a mean is kept
    as a sum of two: rows that come one by one at 1e15 are as exact as at 0. Columns whose mean is more than 10000
    deviations are read once more for that.

    `transform` goes by the parameters as they are when it is called: with_mean and with_std may be turned off after
    `fit`; turned on, they need what a fit with them finds. It knows no more than `mean_`, `scale_` and
    `n_features_in_`, which may be set by hand; what takes or adds up statistics needs a fit.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.sklearn import BatchNormScaler
    >>> x = np.array([[0.0, 5.0], [2.0, 5.0]], dtype=np.float32)
    >>> BatchNormScaler().fit_transform(x)
    array([[-1.,  0.],
           [ 1.,  0.]], dtype=float32)
    >>> a, b = BatchNormScaler().fit(x), BatchNormScaler().fit(x + 2)
    >>> (a + b).mean_
    array([2., 6.])
    """

    _parameter_constraints: dict[str, list[Any]] = {  # noqa: RUF012 - scikit-learn reads it from the class
        "copy": ["boolean"],
        "with_mean": ["boolean"],
        "with_std": ["boolean"],
        "epsilon": [Interval(Real, 0, None, closed="left")],
        "momentum": [Interval(Real, 0, 1, closed="both"), None],
        "gamma": [Real, "array-like", None],
        "beta": [Real, "array-like", None],
    }

    def __init__(
        self,
        *,
        copy: bool = True,
        with_mean: bool = True,
        with_std: bool = True,
        epsilon: float = 0.0,
        momentum: float | None = None,
        gamma: ArrayLike | None = None,
        beta: ArrayLike | None = None,
    ) -> None:
        self.copy = copy
        self.with_mean = with_mean
        self.with_std = with_std
        self.epsilon = epsilon
        self.momentum = momentum
        self.gamma = gamma
        self.beta = beta

    # -- statistics --------------------------------------------------------------------------------------------------

    def fit(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> Self:
        """Find mean and deviation of X.

        Parameters
        ----------
        X : array_like or sparse matrix of shape (n_samples, n_features)
            The data.
        y : None
            Ignored.
        sample_weight : array_like of shape (n_samples,), optional
            Weights of samples, not negative: a weight of 2 is the sample twice.

        Returns
        -------
        BatchNormScaler
            This object.
        """
        if hasattr(self, "_running"):
            del self._running, self._weighted
            for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
                delattr(self, name)
        self.partial_fit(X, y, sample_weight)
        return self

    @with_callbacks  # type: ignore[untyped-decorator, unused-ignore]
    def partial_fit(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> Self:
        """Add a batch to what was seen before.

        Parameters
        ----------
        X : array_like or sparse matrix of shape (n_samples, n_features)
            The batch.
        y : None
            Ignored.
        sample_weight : array_like of shape (n_samples,), optional
            Weights of samples, not negative.

        Returns
        -------
        BatchNormScaler
            This object.
        """
        self._check_parameters()
        table: Any = X
        if not self._fits(X):
            table = self._validated(X, ensure_all_finite=False, reset=not hasattr(self, "_running"))
        self._refuse_centering(table)
        self._range(table.shape[1])
        context = None
        if hasattr(self, "_init_callback_context"):
            context = self._init_callback_context()
            context.call_on_fit_task_begin(estimator=self, X=table, y=y, metadata={"sample_weight": sample_weight})
        weight = None
        if sample_weight is not None:
            with config_context(array_api_dispatch=False):  # as for X
                weight = _check_sample_weight(sample_weight, table, dtype=np.float64, ensure_non_negative=True)
            if not weight.any():  # before scikit-learn 1.9 that is not part of the check
                raise ValueError("Sample weights must contain at least one non-zero number.")
        self._add(self._statistics(table, weight), weighted=weight is not None)
        if context is not None:
            context.call_on_fit_task_end(
                estimator=self,
                X=table,
                y=y,
                metadata={"sample_weight": sample_weight},
                reconstruction_attributes={},
            )
        return self

    def _statistics(self, table: Any, weight: Array | None) -> Running:
        """Return the statistics of a batch, or raise if it has infinite values."""
        if sparse.issparse(table):
            self._check_finite(table.data[: table.nnz])
            return of_sparse(table, weight)
        if weight is not None and not weight.all():
            self._check_finite(table[weight == 0])  # what the statistics do not show
        part, suspicious = Running.of(table, weight)
        if suspicious.any():
            self._check_finite(table)
        return part

    def _add(self, part: Running, *, weighted: bool) -> None:
        """Take statistics over, and set the attributes that scikit-learn's users know."""
        if hasattr(self, "_running"):
            running = self._running.copy()
            if self.momentum is not None:
                running.decay(float(self.momentum), part.count > 0)
            seen = self._seen + part.count
            running.merge(part)
            weighted = weighted or self._weighted
        else:
            running, seen = part.copy(), part.count.copy()
        self._set(running, seen, weighted)

    def _set(self, running: Running, seen: Array, weighted: bool) -> None:
        self._running, self._seen, self._weighted = running, seen, weighted
        counts = seen if weighted else seen.astype(np.int64)
        self.n_samples_seen_ = counts[0] if (counts == counts[0]).all() else counts
        mean = np.where(running.count > 0, running.mean, np.nan)
        self.mean_ = mean if self.with_mean or self.with_std else None
        self.var_ = self.scale_ = None
        if self.with_std:
            self.var_ = running.variance()
            self.scale_ = _deviation(self.var_, mean, running.count, float(self.epsilon))

    def merge(self, other: BatchNormScaler | Moments) -> Self:
        """Add what another scaler has seen, as if this one had seen it.

        Parameters
        ----------
        other : BatchNormScaler or Moments
            Of the same features; it stays as it is. One that has seen nothing changes nothing.

        Returns
        -------
        BatchNormScaler
            This object.

        Raises
        ------
        TypeError
            If other is neither.
        ValueError
            If the features differ.
        """
        self._check_parameters()
        if isinstance(other, Moments):
            if not other._sized:
                return self
            part = Running.from_moments(other)
            seen, names = part.count.copy(), None
            weighted = np.asarray(other.count).dtype.kind == "f"
        elif isinstance(other, BatchNormScaler):
            if not hasattr(other, "_running"):
                return self
            part, seen, weighted = other._running.copy(), other._seen.copy(), other._weighted
            names = getattr(other, "feature_names_in_", None)
        else:
            raise TypeError(must("other", "be a BatchNormScaler or Moments", type(other).__name__))
        if not len(part.count):
            raise ValueError(must("other", "have at least one feature", 0))
        if not hasattr(self, "_running"):
            self.n_features_in_ = len(part.count)
            if names is not None:
                self.feature_names_in_ = names
            self._set(part, seen, weighted)
            return self
        if len(part.count) != self.n_features_in_:
            raise ValueError(must("other", f"have {self.n_features_in_} features", len(part.count)))
        ours = getattr(self, "feature_names_in_", None)
        if names is not None and ours is not None and list(names) != list(ours):
            raise ValueError(must("other", f"have the features {list(ours)}", list(names)))
        self._set(self._running.copy().merge(part), self._seen + seen, self._weighted or weighted)
        return self

    def __add__(self, other: BatchNormScaler) -> BatchNormScaler:
        """Return a scaler with this one's parameters that has seen what both have."""
        if not isinstance(other, BatchNormScaler):
            return NotImplemented
        result: BatchNormScaler = clone(self)
        return result.merge(self).merge(other)

    def to_moments(self) -> Moments:
        """Return what was seen as `fastbn.Moments`.

        Returns
        -------
        fastbn.Moments
            With counts per feature where values were missing, and sums of weights where samples had weights or
            momentum has let them count for less.
        """
        check_is_fitted(self, "_running")
        running: Running = self._running
        return running.to_moments(weighted=self._weighted)

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_parameters(self) -> None:
        """Validate the parameters, unless scikit-learn is told not to.

        Its `_fit_context` would not look at those that changed after a first fit.
        """
        if not get_config()["skip_parameter_validation"]:
            self._validate_params()

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn what the scaler can do."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.sparse = not self.with_mean
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _deviation(variance: Array, mean: Array, count: Array, epsilon: float) -> Array:
    """Return what columns are divided by; 1 for those that are constant as far as rounding lets one say.

    A two-pass variance of n equal values may come out as large as n u var + (n u mean)^2 (Chan, Golub, LeVeque 1983),
    which is StandardScaler's rule. With epsilon nothing is divided by 0, and there are no exceptions.
    """
    if epsilon:
        return np.sqrt(variance + epsilon)
    u = np.finfo(np.float64).eps
    with np.errstate(all="ignore"):
        constant = variance <= count * u * variance + (count * mean * u) ** 2
    deviation = np.sqrt(variance)
    deviation[constant] = 1.0
    return deviation
