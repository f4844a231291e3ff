"""Bytes of a mask other than 0 and 1 are True, as in NumPy: an image of 0 and 255 that was viewed as bool has them."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference as ref
from test_weights import run

from fastbn import moments

pytestmark = pytest.mark.kernels

CASES = [((6, 3), -1), ((300, 64), -1), ((40, 3, 3, 3), 1), ((6, 3, 9, 9), 1), ((6, 9, 9, 3), -1)]


@pytest.mark.levels
@pytest.mark.parametrize("name", ["mask", "sample_weight"])
@pytest.mark.parametrize("form", ["sample", "position", "value"])
@pytest.mark.parametrize("case", CASES, ids=cases.name)
def test_every_byte_but_0_is_true(case, form, name):
    shape, axis = case
    x, dy = cases.normal(shape, seed=1), cases.normal(shape, seed=2)
    gamma, beta = cases.parameters(shape[axis])
    position = tuple(1 if a == axis % len(shape) else n for a, n in enumerate(shape))
    of = {"sample": shape[:1], "position": position, "value": shape}[form]
    raw = np.random.default_rng(3).choice(np.array([0, 1, 2, 255], np.uint8), of)
    for policy in ("propagate", "omit"):
        got = run(x, dy, gamma, beta, axis, **{name: raw.view(np.bool_)}, nan_policy=policy)
        expected = run(x, dy, gamma, beta, axis, **{name: raw != 0}, nan_policy=policy)
        for result in expected:
            ref.assert_same_bits(got[result], expected[result], result)
    assert moments(x, axis=axis, **{name: raw.view(np.bool_)}) == moments(x, axis=axis, **{name: raw != 0})
