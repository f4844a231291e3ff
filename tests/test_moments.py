"""Moments: counts, means and sums of squares that can be updated, merged and stored."""

from __future__ import annotations

import copy
import pickle

import cases
import numpy as np
import pytest
import reference as ref
from cases import BOTH, DTYPES
from hypothesis import given
from hypothesis import strategies as st

from fastbn import Moments, moments


def assert_moments(s: Moments, x, axis=-1) -> None:
    """s are the moments of x, within the bound for float64 updating."""
    exact = ref.moments(x, axis)
    assert s.count == exact.count
    assert s.mean.dtype == s.m2.dtype == np.float64
    ref.assert_within(s.mean, exact.mean, ref.mean_tolerance(x, axis), "mean")
    ref.assert_within(s.m2, exact.m2, ref.variance_tolerance(x, axis) * exact.m2, "m2")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BOTH, ids=cases.name)
def test_of_an_array(case, dtype):
    shape, axis = case
    x = cases.normal(shape, dtype, mean=4, deviation=3)
    s = moments(x, axis=axis)
    assert_moments(s, x, axis)
    for ddof in (0, 1):
        np.testing.assert_array_equal(s.variance(ddof), s.m2 / (s.count - ddof))


@pytest.mark.parametrize("dtype", DTYPES)
def test_update_batch_by_batch(dtype):
    x = cases.normal((1000, 7), dtype, mean=100)
    s = Moments(7)
    for part in np.array_split(x, 23):
        assert s.update(part) is s
    assert_moments(s, x)
    one_by_one = Moments()
    for row in x[:200]:
        one_by_one.update(row)
    assert_moments(one_by_one, x[:200])


@pytest.mark.parametrize("offset", [1e15, -1e15, 1e12])
def test_large_offsets_row_by_row(offset):
    """Values are rounded to 1/8 at 1e15: their deviations are exact in float64, and must come out."""
    x = cases.normal((500, 3), np.float64, mean=offset, deviation=100)
    s = Moments()
    for row in x:
        s.update(row[None])
    exact = ref.moments(x)
    np.testing.assert_allclose(s.mean, exact.mean.astype(float), rtol=4 * ref.U64 * len(x) ** 0.5)
    ref.assert_within(s.m2, exact.m2, ref.variance_tolerance(x) * exact.m2)
    assert_moments(moments(x), x)


def test_merge_and_add():
    x = cases.normal((300, 5), np.float64, mean=10)
    a, b = moments(x[:100]), moments(x[100:])
    before = a.to_dict()
    total = a + b
    assert_moments(total, x)
    assert a == Moments.from_dict(before)
    assert a.merge(b) is a
    assert a == total
    assert_moments(a, x)
    assert b == moments(x[100:])


def test_arrays_that_were_read_stay_as_they_are():
    a, b = moments(cases.normal((20, 5))), moments(cases.normal((20, 5), seed=1))
    mean, m2 = a.mean, a.m2
    kept = mean.copy(), m2.copy()
    a.merge(b).update(np.ones((2, 5)))
    np.testing.assert_array_equal(mean, kept[0])
    np.testing.assert_array_equal(m2, kept[1])
    for copy_of_b in (Moments() + b, b + Moments(), Moments().merge(b)):
        copy_of_b.mean[:] = 99
        assert (b.mean != 99).all()


def test_merge_with_itself():
    x = cases.normal((100, 5), np.float64, mean=10)
    s = moments(x)
    assert_moments(s + s, np.concatenate([x, x]))
    s.merge(s)
    assert_moments(s, np.concatenate([x, x]))


def test_sum_of_many():
    x = cases.normal((300, 5), np.float64, mean=10)
    total = Moments(5)
    for part in np.array_split(x, 7):
        total = total + moments(part)
    assert_moments(total, x)


@pytest.mark.parametrize("empty", [lambda: Moments(), lambda: Moments(5), lambda: moments(np.empty((0, 5)))])
def test_empty_is_neutral(empty):
    s = moments(cases.normal((20, 5)))
    assert (s + empty()) == s
    assert (empty() + s) == s
    before = s.to_dict()
    s.merge(empty())
    s.update(np.empty((0, 5), np.float32))
    assert s == Moments.from_dict(before)
    assert empty().count == 0
    assert (empty() + empty()).count == 0


def test_empty_and_single():
    s = Moments(3)
    assert s.count == 0
    assert s.mean.tolist() == s.m2.tolist() == [0, 0, 0]
    assert np.isnan([s.variance(), s.variance(1)]).all()  # undefined, as documented
    s.update(np.array([[1.0, 2.0, 3.0]]))
    assert s.count == 1
    assert s.mean.tolist() == [1, 2, 3]
    assert s.variance().tolist() == s.variance(1).tolist() == [0, 0, 0]


def test_a_failed_update_changes_nothing():
    s = moments(cases.normal((20, 5)))
    before = s.to_dict()
    for bad in (np.ones((3, 4)), np.ones((3, 5), int), np.float64(1)):
        with pytest.raises((TypeError, ValueError)):
            s.update(bad)
    with pytest.raises(ValueError, match="5"):
        s.merge(Moments(4))
    assert s == Moments.from_dict(before)


def through_pickle(s):
    return pickle.loads(pickle.dumps(s))


def through_dict(s):
    return Moments.from_dict(s.to_dict())


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, through_pickle, through_dict])
def test_copies(clone):
    s = moments(cases.normal((20, 5), mean=3))
    twin = clone(s)
    assert twin == s
    assert twin is not s
    kept = s.to_dict()
    twin.update(np.ones((3, 5)))
    assert twin != s
    assert s == Moments.from_dict(kept)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol(protocol):
    """Also of what has seen nothing yet."""
    seen, fresh = pickle.loads(pickle.dumps([moments(cases.normal((20, 5))), Moments()], protocol))
    assert seen == moments(cases.normal((20, 5)))
    assert fresh.merge(seen) == seen


def test_dict():
    s = moments(cases.normal((20, 5)))
    d = s.to_dict()
    assert set(d) == {"count", "mean", "m2"}
    assert type(d["count"]) is int
    d["mean"][:] = 99
    assert (s.mean != 99).all()


BAD = [
    {"count": -1}, {"count": -1.5}, {"count": "3"}, {"mean": np.zeros(4)}, {"m2": np.zeros((5, 1))},
    {"m2": -np.ones(5)}, {"count": 0}, {"mean": np.zeros(5, complex)}, {"more": 1},
    {"count": 2**53 + 1}, {"count": 10**400}, {"count": np.full(5, 2**53 + 1)}, {"count": [10**400] * 5},
    {"count": np.array([1, 1, 1, 1, 2**63], np.uint64)},
]  # fmt: skip


@pytest.mark.parametrize("wrong", BAD, ids=str)
def test_bad_dicts(wrong):
    d = {"count": 3, "mean": np.zeros(5), "m2": np.ones(5)} | wrong
    with pytest.raises((TypeError, ValueError)):
        Moments.from_dict(d)
    for key in ("count", "mean", "m2"):
        with pytest.raises((KeyError, ValueError)):
            Moments.from_dict({k: v for k, v in d.items() if k not in (key, "more")})


@pytest.mark.parametrize("count", [2**53, [2**53, 1, 1, 1, 1]], ids=["one", "per channel"])
def test_counts_are_bounded(count):
    s = Moments.from_dict({"count": count, "mean": np.zeros(5), "m2": np.ones(5)})
    kept = s.to_dict()
    for total in (s + Moments(5), Moments() + s):
        assert total == s
    for other in (moments(np.ones((1, 5))), s):
        with pytest.raises(ValueError, match=r"at most 2\*\*53"):
            s.merge(other)
        assert s == Moments.from_dict(kept)
    weighted = Moments.from_dict({"count": 1e300, "mean": np.zeros(5), "m2": np.ones(5)})
    assert weighted.count == 1e300
    assert (s + weighted).count == 1e300  # sums of weights are rounded


def test_repr_and_equality():
    s = moments(cases.normal((20, 5)))
    assert "20" in repr(s)
    assert "Moments" in repr(s)
    assert s != moments(cases.normal((20, 5), seed=1))
    assert s != Moments(4)
    assert s != "moments"
    with pytest.raises(TypeError, match="unhashable"):
        hash(s)


# -- properties --------------------------------------------------------------------------------------------

data = st.builds(
    lambda rows, channels, seed, mean, power: cases.normal(
        (rows, channels), np.float64, mean=mean, deviation=10.0**power, seed=seed
    ),
    st.integers(1, 200),
    st.integers(1, 9),
    st.integers(0, 2**20),
    st.sampled_from([0.0, 1.0, -1e3, 1e7]),
    st.integers(-3, 3),
)


@given(data, st.lists(st.integers(0, 200), max_size=6))
def test_merge_of_splits_is_the_whole(x, cuts):
    parts = [moments(part) for part in np.split(x, sorted(c % (len(x) + 1) for c in cuts))]
    total = Moments()
    for part in parts:
        total.merge(part)
    assert_moments(total, x)
    backwards = Moments()
    for part in reversed(parts):
        backwards = part + backwards
    assert_moments(backwards, x)


@given(data, st.randoms(use_true_random=False))
def test_permutation(x, random):
    order = list(range(len(x)))
    random.shuffle(order)
    assert_moments(moments(x[order]), x)


@given(data, data, data)
def test_merging_is_associative_and_commutative(a, b, c):
    channels = min(a.shape[1], b.shape[1], c.shape[1])
    parts = [p[:, :channels] for p in (a, b, c)]
    x = np.concatenate(parts)
    s, t, u = (moments(p) for p in parts)
    for total in ((s + t) + u, s + (t + u), (u + t) + s):
        assert_moments(total, x)


@given(data, st.integers(-60, 60))
def test_powers_of_two_scale_exactly(x, power):
    s, t = moments(x), moments(np.ldexp(x, power))
    np.testing.assert_array_equal(t.mean, np.ldexp(s.mean, power))
    np.testing.assert_array_equal(t.m2, np.ldexp(s.m2, 2 * power))
