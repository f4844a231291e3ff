"""What BatchNormScaler computes: StandardScaler's results, and what that does not have."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st
from scaler_cases import DTYPES, assert_alike, table

pytest.importorskip("sklearn", minversion="1.6")

from scipy import sparse
from sklearn.exceptions import NotFittedError
from sklearn.preprocessing import StandardScaler

import fastbn
from fastbn.sklearn import BatchNormScaler


@pytest.mark.parametrize("with_mean", [True, False])
@pytest.mark.parametrize("with_std", [True, False])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float16, *DTYPES, np.int32])
def test_standard_scaler(dtype, order, with_std, with_mean, rng):
    x = table(rng, np.float64 if dtype is np.float16 else dtype)
    x = np.asarray(x / 16 if dtype is np.float16 else x, dtype, order=order)
    options = {"with_mean": with_mean, "with_std": with_std}
    ours, theirs = BatchNormScaler(**options).fit(x), StandardScaler(**options).fit(x)
    assert_alike(ours, theirs)
    y, z = ours.transform(x), theirs.transform(x)
    assert y.dtype == z.dtype
    # StandardScaler sums one value after the other (n u64) and rounds the mean to the type of the data (u): that moves
    # all of a column. Its variance is relative to that mean.
    u = np.finfo(y.dtype).eps
    error = (u + len(x) * ref.U64) * abs(x.astype(float)).max(axis=0)
    error = error / (1 if theirs.scale_ is None else theirs.scale_)
    size = abs(z.astype(np.float64))
    assert (abs(y - z.astype(np.float64)) <= 4 * u * (size + 1) + error + error**2 * size + 1e-12 * size).all()
    back = ours.inverse_transform(y)
    assert back.dtype == y.dtype
    np.testing.assert_allclose(back, x, rtol=4 * u, atol=4 * u * 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_are_scaled_within_the_tolerance_of_batch_norm(dtype, rng):
    x = table(rng, dtype)[:, :4]
    scaler = BatchNormScaler().fit(x)
    exact = ref.moments(x)
    ref.assert_within(scaler.mean_, exact.mean, ref.mean_tolerance(x))
    ref.assert_within(scaler.var_, exact.variance(), ref.variance_tolerance(x))
    ref.assert_within(scaler.transform(x), ref.train(x, epsilon=0.0), ref.train_tolerance(x, epsilon=0.0))


@given(st.integers(1, 60), st.lists(st.integers(1, 59), max_size=6), st.sampled_from([0.0, 1e4, -1e15]))
def test_any_split_is_the_whole(rows, cuts, offset):
    x = np.random.default_rng(rows).normal(offset, 3, (rows, 3))
    pieces = [p for p in np.split(x, sorted(min(c, rows) for c in cuts)) if len(p)]
    streamed, merged = BatchNormScaler(), BatchNormScaler()
    for piece in pieces:
        streamed.partial_fit(piece)
        merged.merge(BatchNormScaler().fit(piece))
    whole = BatchNormScaler().fit(x)
    for scaler in (streamed, merged):
        assert scaler.n_samples_seen_ == rows
        np.testing.assert_allclose(scaler.mean_, whole.mean_, rtol=1e-15, atol=1e-14)
        np.testing.assert_allclose(scaler.var_, whole.var_, rtol=1e-12, atol=1e-12 if offset == 0 else 1e-9)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_rows_at_1e15(step, rng):
    """Where neighbouring float64 are 0.125 apart, single rows of deviation 1 still count."""
    x = rng.normal(1e15, 1, (1000, 2))
    scaler = BatchNormScaler(epsilon=1e-20)  # StandardScaler's rule has 1e15 + 1 for a constant
    for start in range(0, len(x), step):
        scaler.partial_fit(x[start : start + step])
    for j in range(2):
        values = [Fraction(v) for v in x[:, j]]
        mean = sum(values) / len(values)
        variance = float(sum((v - mean) ** 2 for v in values) / len(values))
        got = Fraction(scaler._running.mean[j]) + Fraction(scaler._running.low[j])
        assert abs(float(got - mean)) < 1e-12
        assert scaler.mean_[j] == float(mean)
        assert abs(scaler.var_[j] / variance - 1) < 1e-12
        y = scaler.transform(x)[:, j]
        np.testing.assert_allclose(y, [float(v - mean) / variance**0.5 for v in values], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("condition", [1e2, 9e3, 1.1e4, 1e6, 1e8, 1e12])
@pytest.mark.parametrize("rows", [3, 100, 3000])
@pytest.mark.parametrize("order", ["random", "sorted"])
def test_variances_are_exact_at_any_distance_from_zero(order, rows, condition, rng):
    """The mean's rounding, a share of u of it, may show in a variance where the mean is up to 10000 deviations."""
    x = rng.normal(size=(rows, 8))
    x = np.sort(x, axis=0) if order == "sorted" else x
    x = np.column_stack([condition * x.std(axis=0) + x, 1 + x[:, :1] / 1e4])
    scaler, halves = BatchNormScaler(epsilon=1e-300).fit(x), BatchNormScaler(epsilon=1e-300)
    for half in np.array_split(x, 2):
        halves.partial_fit(half)
    for j in range(x.shape[1]):
        values = [Fraction(v) for v in x[:, j]]
        mean = sum(values) / rows
        variance = float(sum((v - mean) ** 2 for v in values) / rows)
        for got in (scaler, halves):
            assert abs(got.var_[j] / variance - 1) < 2e-12


def test_only_columns_far_from_zero_are_read_again(rng, monkeypatch):
    """A mean of 10000 deviations is far."""
    import fastbn.running

    seen = []
    centered = fastbn.running._centered
    monkeypatch.setattr(fastbn.running, "_centered", lambda x, far, *rest: seen.append(far) or centered(x, far, *rest))
    x = rng.normal(size=(500, 3)).astype(np.float32)
    BatchNormScaler().fit(x + np.float32(9000))
    assert not seen
    BatchNormScaler().fit(x + np.array([0, 11000, 9000], np.float32))
    assert [far.tolist() for far in seen] == [[False, True, False]]


def test_weights_are_repetitions(rng):
    x, w = table(rng), rng.integers(0, 4, 200)
    weighted, repeated = BatchNormScaler().fit(x, sample_weight=w), BatchNormScaler().fit(np.repeat(x, w, axis=0))
    np.testing.assert_allclose(weighted.mean_, repeated.mean_, rtol=1e-12)
    np.testing.assert_allclose(weighted.var_, repeated.var_, rtol=1e-9, atol=1e-20)
    np.testing.assert_array_equal(weighted.n_samples_seen_, float(w.sum()))
    assert isinstance(weighted.n_samples_seen_, float)
    theirs = StandardScaler().fit(x, sample_weight=w.astype(float))
    assert_alike(weighted, theirs)


def test_missing_values(rng):
    x = table(rng)
    x[rng.random(x.shape) < 0.2] = np.nan
    x[:3] = np.nan
    ours, theirs = BatchNormScaler(), StandardScaler()
    for rows in (slice(0, 50), slice(50, 60), slice(60, 200)):
        ours.partial_fit(x[rows])
        theirs.partial_fit(x[rows])
    assert_alike(ours, theirs)
    np.testing.assert_array_equal(ours.n_samples_seen_, (~np.isnan(x)).sum(axis=0))
    y = ours.transform(x)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    np.testing.assert_allclose(y, theirs.transform(x), atol=1e-7)


def test_a_feature_may_begin_with_nothing_but_missing_values():
    scaler = BatchNormScaler().partial_fit([[1.0, np.nan], [3.0, np.nan]])
    assert np.isnan(scaler.mean_[1])
    scaler.partial_fit([[2.0, 5.0], [2.0, 7.0]])
    np.testing.assert_array_equal(scaler.mean_, [2.0, 6.0])
    np.testing.assert_array_equal(scaler.n_samples_seen_, [4, 2])


def test_what_is_missing_in_a_feature_shows_in_no_other(rng):
    x = table(rng)
    holes = x.copy()
    holes[7, 2] = np.nan
    whole, part = BatchNormScaler().fit(x), BatchNormScaler().fit(holes)
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(part.var_[others], whole.var_[others])
    np.testing.assert_array_equal(part.mean_[others], whole.mean_[others])


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("offset", [1e15, -3e11, 1e3])
def test_missing_values_and_weights_far_from_zero(offset, holes, weights, rng):
    """Against exact fractions: the mean is a sum of two float64, also of rows that have weights."""
    x = offset + rng.integers(-16, 17, (500, 2)) / 8
    w = rng.integers(0, 5, 500) / 4 if weights else None
    if holes:
        x[rng.random(x.shape) < 0.3] = np.nan
    scaler = BatchNormScaler(epsilon=1e-20)
    for rows in (slice(0, 77), slice(77, 500)):
        scaler.partial_fit(x[rows], sample_weight=None if w is None else w[rows])
    for j in range(2):
        seen = ~np.isnan(x[:, j])
        values = [Fraction(v) for v in x[seen, j]]
        shares = [Fraction(v) for v in (np.ones(500) if w is None else w)[seen]]
        mean = sum(v * s for v, s in zip(values, shares, strict=True)) / sum(shares)
        m2 = sum(s * (v - mean) ** 2 for v, s in zip(values, shares, strict=True))
        got = Fraction(scaler._running.mean[j]) + Fraction(scaler._running.low[j])
        assert abs(float(got - mean)) < 1e-12
        assert abs(scaler.var_[j] / float(m2 / sum(shares)) - 1) < 1e-12


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_infinity_is_refused_where_it_has_no_weight(method, rng):
    x, w = rng.normal(size=(20, 3)), np.ones(20)
    x[4, 1], w[4] = np.inf, 0
    with pytest.raises(ValueError, match="Input X contains infinity"):
        getattr(BatchNormScaler(), method)(x, sample_weight=w)
    x[4, 1] = np.nan
    assert BatchNormScaler().fit(x, sample_weight=w).n_samples_seen_ == 19


def test_data_that_are_said_to_be_finite_are_read_once(rng):
    """Nobody looks for infinity under scikit-learn's assume_finite."""
    from sklearn import config_context

    x = rng.normal(size=(20, 3))
    scaler = BatchNormScaler().fit(x)
    x[3, 1] = np.inf
    with config_context(assume_finite=True):
        y = scaler.transform(x)
    np.testing.assert_array_equal(np.isinf(y), np.isinf(x))


def test_arrays_like_those_that_were_seen_take_a_short_way(rng, monkeypatch):
    """It comes to what scikit-learn's checks let through, and everything else goes through them."""
    import fastbn.scaling

    x = rng.normal(2, 3, (30, 4))
    frozen, names = x.copy(), BatchNormScaler()
    frozen.flags.writeable = False
    scaler = BatchNormScaler().fit(x)
    wanted = scaler.transform(x.tolist())
    checked = []

    def validate(*args, **kwargs):
        checked.append(1)
        return checks(*args, **kwargs)

    checks = fastbn.scaling.validate_data
    monkeypatch.setattr(fastbn.scaling, "validate_data", validate)
    for plain in (x, frozen, np.asfortranarray(x), x[::2]):
        scaler.transform(plain)
    ref.assert_same_bits(scaler.transform(x), wanted)
    assert not checked
    with pytest.raises(ValueError, match="X has 3 features, but BatchNormScaler is expecting 4 features"):
        scaler.transform(x[:, :3])
    with pytest.raises(ValueError, match="minimum of 1 is required"):
        scaler.partial_fit(x[:0])
    with pytest.raises(ValueError, match="Expected 2D array, got 1D array"):
        scaler.transform(x[0])
    for other in (x.tolist(), x.astype(np.int32), x.astype(">f8"), np.ma.array(x)):
        np.testing.assert_allclose(scaler.transform(other), scaler.transform(np.array(other, np.float64)))
    result = scaler.transform(frozen, copy=False)
    assert result is not frozen
    assert len(checked) == 8
    names.fit(x).feature_names_in_ = np.array(list("abcd"), object)
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        names.transform(x)


def test_infinity_is_refused_and_changes_nothing(rng):
    x = rng.normal(size=(20, 3)).astype(np.float32)
    scaler = BatchNormScaler().fit(x)
    before = scaler.mean_.copy(), scaler.n_samples_seen_
    bad = x.copy()
    bad[4, 1] = np.inf
    bad[5, 0] = np.nan
    for call in (scaler.partial_fit, scaler.transform, scaler.inverse_transform):
        with pytest.raises(ValueError, match=r"Input X contains infinity or a value too large for dtype\('float32'\)"):
            call(bad)
    kept = bad.copy()
    with pytest.raises(ValueError, match="infinity"):
        scaler.transform(bad, copy=False)
    np.testing.assert_array_equal(bad, kept)
    np.testing.assert_array_equal(scaler.mean_, before[0])
    assert scaler.n_samples_seen_ == before[1]


def test_momentum_forgets():
    """Equal batches: the average with weights momentum^age."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(i, 1, (10, 2)) for i in range(5)]
    scaler = BatchNormScaler(momentum=0.5)
    for batch in batches:
        scaler.partial_fit(batch)
    x, w = np.concatenate(batches), np.repeat(0.5 ** np.arange(4, -1, -1), 10)
    mean = np.average(x, axis=0, weights=w)
    np.testing.assert_allclose(scaler.mean_, mean, rtol=1e-13)
    np.testing.assert_allclose(scaler.var_, np.average((x - mean) ** 2, axis=0, weights=w), rtol=1e-12)
    assert scaler.n_samples_seen_ == 50
    all_kept, plain = BatchNormScaler(momentum=1.0), BatchNormScaler()
    only_last = BatchNormScaler(momentum=0.0)
    for batch in batches:
        all_kept.partial_fit(batch)
        plain.partial_fit(batch)
        only_last.partial_fit(batch)
    np.testing.assert_array_equal(all_kept.var_, plain.var_)
    np.testing.assert_allclose(only_last.mean_, batches[-1].mean(axis=0), rtol=1e-14)


def test_momentum_with_single_rows():
    """The variance is that of the weighted rows, not the average of the variances of rows, which are 0."""
    x = np.random.default_rng(1).normal(7, 2, (3000, 1))
    scaler = BatchNormScaler(momentum=0.999)
    for row in x:
        scaler.partial_fit(row[None])
    assert abs(scaler.mean_[0] - 7) < 0.3
    assert abs(scaler.scale_[0] - 2) < 0.2


@pytest.mark.parametrize("momentum, batches", [(0.0, 1), (0.5, 1100), (0.1, 400), (0.9, 3)])
@pytest.mark.parametrize("missing", ["values", "weights"])
def test_momentum_leaves_features_without_values_alone(missing, momentum, batches):
    scaler = BatchNormScaler(momentum=momentum).partial_fit([[1.0, 5.0], [3.0, 7.0]])
    variance = scaler.var_[1]
    for _ in range(batches):
        if missing == "values":
            scaler.partial_fit([[2.0, np.nan], [4.0, np.nan]])
        else:  # of the second feature only what has no weight is there
            scaler.partial_fit([[2.0, np.nan], [4.0, np.nan], [9.0, 1e6]], sample_weight=[1.0, 1.0, 0.0])
    assert scaler.mean_[1] == 6
    assert scaler.var_[1] == variance
    assert scaler._running.count[1] == 2  # what comes next is weighed as if it came at once
    if momentum == 0:
        np.testing.assert_array_equal(scaler.mean_, [3.0, 6.0])


def test_epsilon_is_batch_norms(rng):
    x = table(rng)
    y = BatchNormScaler(epsilon=1e-3).fit_transform(x)
    np.testing.assert_allclose(y, fastbn.batch_norm(x, training=True, epsilon=1e-3), rtol=1e-9, atol=1e-9)
    assert not y[:, 4].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_range(dtype, rng):
    x = table(rng, dtype)[:, :4]
    gamma, beta = [1.0, 2.0, -3.0, 0.5], [0.0, 10.0, 1.0, -1.0]
    scaler = BatchNormScaler(gamma=gamma, beta=beta).fit(x)
    y = scaler.transform(x)
    np.testing.assert_allclose(y.mean(axis=0, dtype=float), beta, atol=1e-5)
    np.testing.assert_allclose(y.std(axis=0, dtype=float), np.abs(gamma), rtol=1e-5)
    np.testing.assert_allclose(scaler.inverse_transform(y), x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        BatchNormScaler(gamma=2.0, beta=5.0).fit_transform(x), BatchNormScaler().fit_transform(x) * 2 + 5, rtol=1e-5
    )


@pytest.mark.parametrize("size, gamma", [(1e-42, 1.0), (1e-39, 1.0), (1e-37, 1e20), (1e36, 1e-20)])
@pytest.mark.parametrize("copy", [True, False])
def test_scales_that_float32_has_no_place_for(copy, size, gamma, rng):
    """Data and results have one; only what lies between them has not."""
    x = (size * rng.normal(size=(40, 3))).astype(np.float32)
    scaler = BatchNormScaler(copy=copy, gamma=gamma).fit(x)
    wanted = StandardScaler().fit_transform(x.astype(np.float64)) * gamma
    y = scaler.transform(x.copy())
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6 * gamma)
    np.testing.assert_allclose(scaler.inverse_transform(y), x, rtol=1e-6, atol=max(1e-6 * size, 2e-45))


@pytest.mark.parametrize("name, value, message", [
    ("gamma", [1.0, 2.0], "gamma must be a number or have shape (4,), got (2,)"),
    ("beta", [[1.0]], "beta must be a number or have shape (4,), got (1, 1)"),
    ("beta", float("nan"), "beta must be finite, got nan"),
    ("gamma", np.ones(4, np.complex64), "gamma must have a real dtype, got complex64"),
])  # fmt: skip
def test_messages_of_the_range(name, value, message, rng):
    with pytest.raises((TypeError, ValueError)) as error:
        BatchNormScaler(**{name: value}).fit(rng.normal(size=(5, 4)))
    assert str(error.value) == message


def test_gamma_of_zero_has_no_inverse(rng):
    scaler = BatchNormScaler(gamma=[1.0, 0.0]).fit(rng.normal(size=(5, 2)))
    with pytest.raises(ValueError, match="gamma must have no zeros in inverse_transform, got one in feature 1"):
        scaler.inverse_transform(np.ones((2, 2)))
    with pytest.raises(ValueError, match="X must have 2 features, got 3"):
        BatchNormScaler().fit(np.eye(2)).inverse_transform(np.ones((2, 3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_in_place(order, dtype, rng):
    x = np.asarray(table(rng, dtype), order=order)
    wanted = BatchNormScaler().fit_transform(x)
    scaler = BatchNormScaler(copy=False).fit(x)
    buffer = x.copy(order=order)
    assert scaler.transform(buffer) is buffer
    ref.assert_same_bits(buffer, wanted)
    assert scaler.inverse_transform(buffer) is buffer
    frozen = x.copy()
    frozen.flags.writeable = False
    ref.assert_same_bits(np.ascontiguousarray(scaler.transform(frozen)), np.ascontiguousarray(wanted))


def test_the_order_of_memory_stays(rng):
    x = np.asfortranarray(rng.normal(size=(40, 6)).astype(np.float32))
    assert BatchNormScaler().fit_transform(x).flags.f_contiguous


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_temporary_copies(dtype, rng):
    x = rng.normal(size=(20000, 20)).astype(dtype)
    scaler = BatchNormScaler().fit(x)

    def peak(call):
        tracemalloc.start()
        try:
            kept = call()
            return tracemalloc.get_traced_memory()[1], kept
        finally:
            tracemalloc.stop()

    assert peak(lambda: scaler.partial_fit(x))[0] < x.nbytes / 8
    holes = x.copy()
    holes[::7] = np.nan
    assert peak(lambda: scaler.partial_fit(holes))[0] < x.nbytes / 8
    weight = rng.uniform(size=len(x))
    assert peak(lambda: scaler.partial_fit(holes, sample_weight=weight))[0] < x.nbytes / 8 + weight.nbytes
    assert peak(lambda: scaler.transform(x))[0] < x.nbytes * 9 / 8
    assert peak(lambda: scaler.transform(x, copy=False))[0] < x.nbytes / 8


def test_the_same_bits_for_any_number_of_threads(rng):
    x = rng.normal(1000, 1, (70000, 8)).astype(np.float32)
    results = []
    for n in (1, 2, 3):
        with fastbn.threads(n):
            scaler = BatchNormScaler().fit(x)
            results.append((scaler.mean_.tobytes(), scaler.var_.tobytes(), scaler.transform(x).tobytes()))
    assert len(set(results)) == 1


@pytest.mark.parametrize("name", ["with_mean", "with_std"])
def test_what_is_turned_off_after_fit_is_off(name, rng):
    x = table(rng)
    ours, theirs = BatchNormScaler().fit(x).set_params(**{name: False}), StandardScaler().fit(x)
    theirs.set_params(**{name: False})
    y = ours.transform(x)
    np.testing.assert_allclose(y, theirs.transform(x), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(ours.inverse_transform(y), x, rtol=1e-12)
    np.testing.assert_allclose(ours.to_batch_norm()(x), y, rtol=1e-12, atol=1e-12)
    if name == "with_std":
        np.testing.assert_array_equal(ours.set_params(with_mean=False).transform(sparse.csr_array(x)).toarray(), x)


def test_what_is_turned_on_after_fit_was_not_found(rng):
    """An error, as it is one of StandardScaler's, and not what looks like a result."""
    x = table(rng)
    for name, attribute in (("with_std", "scale_"), ("with_mean", "mean_")):
        scaler = BatchNormScaler(with_mean=False, with_std=False).fit(x).set_params(**{name: True})
        for method, arguments in (("transform", [x]), ("inverse_transform", [x]), ("to_batch_norm", [])):
            with pytest.raises(ValueError, match=rf"{attribute} must have shape \(5,\) where {name} is True, got None"):
                getattr(scaler, method)(*arguments)
        scaler.partial_fit(x).transform(x)


def test_attributes_set_by_hand(rng):
    x = rng.normal(3, 2, (40, 5))
    fitted = BatchNormScaler().fit(x)
    scaler = BatchNormScaler()
    scaler.mean_, scaler.scale_, scaler.n_features_in_ = list(fitted.mean_), np.repeat(fitted.scale_, 2)[::2], 5
    np.testing.assert_array_equal(scaler.transform(x), fitted.transform(x))
    np.testing.assert_array_equal(scaler.inverse_transform(x), fitted.inverse_transform(x))
    np.testing.assert_array_equal(scaler.to_batch_norm()(x), fitted.to_batch_norm()(x))
    del scaler.n_features_in_
    np.testing.assert_array_equal(scaler.transform(x), fitted.transform(x))
    np.testing.assert_array_equal(scaler.inverse_transform(x), fitted.inverse_transform(x))
    with pytest.raises(NotFittedError):
        scaler.to_moments()
    scaler.mean_ = [1.0]
    for call in (scaler.transform, scaler.inverse_transform):
        with pytest.raises(ValueError, match=r"mean_ must have shape \(5,\) where with_mean is True, got \(1,\)"):
            call(x)


def test_a_mean_set_by_hand_is_all_of_the_mean(rng):
    """The rounding of the mean that was found is no part of it."""
    scaler = BatchNormScaler(with_std=False).fit(rng.normal(1e15, 1, (1001, 1)))
    assert scaler._running.low[0] != 0
    scaler.mean_ = np.array([2.0])
    assert scaler.transform([[2.0]])[0, 0] == 0
