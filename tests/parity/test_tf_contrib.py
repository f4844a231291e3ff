"""``fastbn.compat.tf_contrib`` beside the real ``batch_norm`` of contrib, or of tf_slim, which is the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity.tensorflow1 import EXAMPLES, compare, started
from parity.test_tf_layers import batches, clipping, first_values

pytestmark = [pytest.mark.parity, pytest.mark.slow]


@pytest.fixture(scope="module")
def real():
    with started() as oracle:
        yield oracle


@st.composite
def configurations(draw, version):
    rank = draw(st.sampled_from([2, 2, 3, 4, 4, 4, 5]))
    rows = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    shape = (rows, *draw(st.lists(st.integers(1, 4), min_size=rank - 1, max_size=rank - 1)))
    kind = draw(st.sampled_from(["plain", "plain", "plain", "renorm", "adjusted", "weights"]))
    deferred = st.sampled_from(["update_ops", None, "mine"])
    kwargs = {
        "decay": draw(st.sampled_from([0.0, 0.5, 0.9, 0.999])),
        "epsilon": draw(st.sampled_from([1e-3, 1e-5, 1e-6, 0.1])),
        "center": draw(st.booleans()),
        "scale": draw(st.booleans()),
        "fused": draw(st.sampled_from([None, True, False])),
        "trainable": draw(st.sampled_from([True, True, True, False])),
        "data_format": draw(st.sampled_from(["NHWC", "NHWC", "NCHW"])),
        "updates_collections": draw(deferred) if kind in ("plain", "weights") else "update_ops",
        "zero_debias_moving_mean": kind in ("plain", "weights") and draw(st.booleans()),
    }
    fuses = kind == "plain" and kwargs["fused"] is not False and rank in (2, 4)
    if fuses and kwargs["data_format"] == "NCHW" and version.startswith("1."):
        kwargs["data_format"] = "NHWC"  # its fused kernel for CPUs has nothing else
    if rank == 5 and not version.startswith("1."):
        kwargs["fused"] = False  # TensorFlow 2 fuses rank 5 too, also under the API of version 1
    default, debias = kwargs["updates_collections"] == "update_ops", kwargs["zero_debias_moving_mean"]
    fused = fuses and (rank == 4 or debias or rank == 2)
    axes = (1,) if kwargs["data_format"] == "NCHW" else (rank - 1,)
    if "renorm" in kind:
        kwargs |= {"renorm": True, "renorm_clipping": draw(clipping), "renorm_decay": draw(st.floats(0.1, 0.99))}
    scope = draw(st.sampled_from([None, None, "bn"]))
    if fused and not version.startswith("1."):
        kwargs["epsilon"] = max(kwargs["epsilon"], 1.001e-5)  # which TensorFlow 2 no longer sees to
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    wide = tuple(n if a in axes else 1 for a, n in enumerate(shape))
    scheme = "tf1" if version.startswith("1.13") else "keras"
    values = first_values(random, wide, scheme)
    if debias:
        del values["moving_mean"]  # a debiased mean forgets its first value
    count = draw(st.integers(2, 5))
    request = {
        "api": "contrib",
        "kwargs": kwargs | ({"scope": scope} if scope else {}),
        "scopes": draw(st.sampled_from([[], ["net"], ["a", "b"]])),
        "before": 0 if scope else draw(st.integers(0, 2)),
        "values": values,
        "batches": batches(random, shape, count),
    }
    if kind == "adjusted":
        adjustment = random.uniform(0.8, 1.2, wide), random.uniform(-0.2, 0.2, wide)
        request["adjustment"] = [v.astype(np.float32) for v in adjustment]
    if kind == "weights":
        request["weights"] = [random.integers(1, 5, rows).astype(np.float32) for _ in range(count)]
    options = {
        "axes": axes,
        "epsilon": max(kwargs["epsilon"], 1.001e-5) if fused else kwargs["epsilon"],
        "ddof": int(fused),
        "momentum": kwargs["decay"],
    }
    assert default or kind in ("plain", "weights")
    return request, scheme, options


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_forward_statistics_gradients_and_names(real, data):
    request, scheme, options = data.draw(configurations(real.version))
    compare(real, request, "contrib", scheme, **options)
