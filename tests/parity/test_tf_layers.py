"""``fastbn.compat.tf_layers`` beside TensorFlow's own ``tf.layers.batch_normalization``."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity.tensorflow1 import EXAMPLES, compare, run_program, started

pytestmark = [pytest.mark.parity, pytest.mark.slow]


@pytest.fixture(scope="module")
def real():
    with started() as oracle:
        yield oracle


def batches(random, shape, count):
    """Batches and upstream gradients; means up to 10, deviations from 0.1 to 5."""
    mean, deviation = random.uniform(-10, 10, shape[-1:]), random.uniform(0.1, 5, shape[-1:])
    return [
        tuple(v.astype(np.float32) for v in (random.normal(mean, deviation, shape), random.normal(0, 1, shape)))
        for _ in range(count)
    ]


def first_values(random, shape, scheme):
    """Values for the variables, so that nothing is 0 or 1 by chance; those that a layer has not are not used."""
    values = {
        "gamma": random.normal(1, 0.5, shape),
        "beta": random.normal(0, 1, shape),
        "moving_mean": random.normal(0, 3, shape),
        "moving_variance": random.uniform(0.1, 9, shape),
    }
    if scheme == "keras":
        values |= {
            "moving_stddev": random.uniform(0.5, 3, shape),
            "renorm_mean": random.normal(0, 3, shape),
            "renorm_stddev": random.uniform(0.5, 3, shape),
        }
    return {name: value.astype(np.float32) for name, value in values.items()}


clipping = st.none() | st.fixed_dictionaries(
    {}, optional={"rmin": st.floats(0.2, 1), "rmax": st.floats(1, 4), "dmax": st.floats(0, 5)}
)


@st.composite
def configurations(draw, version):
    rank = draw(st.integers(2, 5))
    rows = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    shape = (rows, *draw(st.lists(st.integers(1, 4), min_size=rank - 1, max_size=rank - 1)))
    axis = draw(st.integers(-rank, rank - 1))
    kind = draw(st.sampled_from(["plain", "plain", "plain", "renorm", "ghost", "ghost renorm", "adjusted", "axes"]))
    if kind == "axes":
        axis = draw(st.permutations(range(rank)).map(lambda p: list(p[:2])))
    if kind.startswith("ghost") and axis % rank == 0:
        axis = -1
    kwargs = {
        "axis": axis,
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])),
        "epsilon": draw(st.sampled_from([1e-3, 1e-5, 1e-6, 0.1])),
        "center": draw(st.booleans()),
        "scale": draw(st.booleans()),
        "fused": draw(st.sampled_from([None, True, False])),
        "trainable": draw(st.sampled_from([True, True, True, False])),
    }
    axes = tuple(sorted(a % rank for a in (axis if isinstance(axis, list) else [axis])))
    groups = 1
    if "renorm" in kind:
        kwargs |= {"renorm": True, "renorm_clipping": draw(clipping), "renorm_momentum": draw(st.floats(0.1, 0.99))}
    if kind.startswith("ghost"):
        kwargs["virtual_batch_size"] = draw(st.sampled_from([v for v in range(1, rows + 1) if rows % v == 0]))
        groups = rows // kwargs["virtual_batch_size"]
    fused = kwargs["fused"] is not False and rank == 4 and axes in ((1,), (3,)) and kind == "plain"
    if fused and axes == (1,) and version.startswith("1."):
        kwargs["fused"] = fused = False  # its fused kernel for CPUs has NHWC alone
    if rank == 5 and not version.startswith("1."):
        kwargs["fused"] = False  # TensorFlow 2 fuses rank 5 too, also under the API of version 1
    name = draw(st.sampled_from([None, None, "bn"]))
    if fused and not version.startswith("1."):
        kwargs["epsilon"] = max(kwargs["epsilon"], 1.001e-5)  # which TensorFlow 2 no longer sees to
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    wide = tuple(n if a in axes else 1 for a, n in enumerate(shape))
    scheme = "tf1" if version.startswith("1.13") else "keras"
    request = {
        "api": "layers",
        "kwargs": kwargs | ({"name": name} if name else {}),
        "scopes": draw(st.sampled_from([[], ["net"], ["a", "b"]])),
        "before": 0 if name else draw(st.integers(0, 2)),
        "values": first_values(random, wide, scheme),
        "batches": batches(random, shape, draw(st.integers(2, 5))),
    }
    if kind == "adjusted":
        adjustment = random.uniform(0.8, 1.2, wide), random.uniform(-0.2, 0.2, wide)
        request["adjustment"] = [v.astype(np.float32) for v in adjustment]
    options = {
        "axes": axes,
        "epsilon": max(kwargs["epsilon"], 1.001e-5) if fused else kwargs["epsilon"],
        "ddof": int(fused),
        "momentum": kwargs["momentum"],
        "groups": groups,
    }
    return request, scheme, options


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_forward_statistics_gradients_and_names(real, data):
    request, scheme, options = data.draw(configurations(real.version))
    compare(real, request, "layers", scheme, **options)


names = st.sampled_from([None, None, "a", "b", "batch_normalization", "a/b"])
steps = st.tuples(
    st.sampled_from(
        ["enter", "enter", "enter default", "exit", "exit", "layers", "layers", "layers", "contrib", "object"]
    ),
    names,
    st.sampled_from([None, None, None, "auto", "auto", True, False]),
).map(lambda step: (step[0], step[1] or "a", step[2]) if step[0].startswith("enter") else step)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(program=st.lists(steps, min_size=1, max_size=15))
def test_names_of_scopes_and_variables(real, program):
    found, wanted = run_program(program), real({"program": program})
    if wanted["failed"] is not None:  # TensorFlow leaves the variables that the call had made before it failed
        for key in ("variables", "trainable"):
            wanted[key] = wanted[key][: len(found[key])]
    assert found == wanted
