"""A wrong argument raises an error that names it, and a call that raises has changed nothing."""

from __future__ import annotations

import re

import cases
import numpy as np
import pytest
from cases import call, snapshot, unchanged

from fastbn import (
    BatchNorm,
    Moments,
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    denormalize,
    fold,
    moments,
    normalize,
    update_moving,
)

C = 6
f32, f64 = np.float32, np.float64
TYPES = "float16, bfloat16, float32, float64, uint8 or int8"


def read_only(a):
    a.flags.writeable = False
    return a


def vector_errors(name, *, missing=False):
    """What can be wrong with any of the four per-channel arrays."""
    yield name, np.ones(C - 1, f32), ValueError, rf"{name} must have shape \(6,\), got \(5,\)"
    yield name, np.ones(C + 1, f32), ValueError, rf"{name} must have shape \(6,\), got \(7,\)"
    yield name, np.ones(0, f32), ValueError, rf"{name} must have shape \(6,\), got \(0,\)"
    yield name, np.ones((1, C), f32), ValueError, rf"{name} must have shape \(6,\), got \(1, 6\)"
    yield name, np.ones((C, 1), f32), ValueError, rf"{name} must have shape \(6,\), got \(6, 1\)"
    yield name, np.array(1, f32), ValueError, rf"{name} must have shape \(6,\), got \(\)"
    yield name, np.ones(C, complex), TypeError, rf"{name} must (have a real dtype|be float).*complex128"
    yield name, np.ones(C, object), TypeError, rf"{name} must (have a real dtype|be float).*object"
    yield name, np.array(["1"] * C), TypeError, rf"{name} must (have a real dtype|be float).*<U1"
    if missing:
        yield name, None, ValueError, name


def moving_errors(name):
    yield from vector_errors(name, missing=True)
    yield name, np.ones(C, np.int64), TypeError, rf"{name} must be float32 or float64.*, got int64"
    yield name, np.ones(C, np.float16), TypeError, rf"{name} must be float32 or float64.*, got float16"
    yield name, read_only(np.ones(C, f32)), ValueError, rf"{name} must be writ.*read-only"
    yield name, [1.0] * C, TypeError, name


WRONG = [
    *vector_errors("gamma"),
    *vector_errors("beta"),
    *moving_errors("moving_mean"),
    *moving_errors("moving_variance"),
    ("x", np.ones((4, C), np.int32), TypeError, f"x must be {TYPES}, got int32"),
    ("x", np.ones((4, C), bool), TypeError, f"x must be {TYPES}, got bool"),
    ("x", np.ones((4, C), complex), TypeError, f"x must be {TYPES}, got complex128"),
    ("x", np.ones((4, C), object), TypeError, f"x must be {TYPES}, got object"),
    ("x", np.ones((4, C), np.longdouble), TypeError, f"x must be {TYPES}, got "),
    ("x", np.array([["a"] * C]), TypeError, f"x must be {TYPES}, got <U1"),
    ("x", None, TypeError, f"x must be {TYPES}, got object"),
    ("x", np.float32(3), ValueError, "x must have at least 1 dimension, got a scalar"),
    ("momentum", 1.5, ValueError, r"momentum must be .*0.*1.*, got 1.5"),
    ("momentum", -0.1, ValueError, r"momentum must be .*0.*1.*, got -0.1"),
    ("momentum", float("nan"), ValueError, "momentum must be .*, got nan"),
    ("momentum", None, ValueError, "batches must be given with momentum=None, got None"),
    ("momentum", "0.9", TypeError, "momentum must be a real number, got '0.9'"),
    ("momentum", 10**400, ValueError, r"momentum must be in \[0, 1\], got inf"),
    ("momentum", [[1], [2, 3]], TypeError, r"momentum must be a real number, got \[\[1\], \[2, 3\]\]"),
    ("epsilon", -1e-3, ValueError, "epsilon must be .*, got -0.001"),
    ("epsilon", float("nan"), ValueError, "epsilon must be .*, got nan"),
    ("epsilon", float("inf"), ValueError, "epsilon must be .*, got inf"),
    ("epsilon", None, TypeError, "epsilon must be a real number, got None"),
    ("epsilon", 1j, TypeError, "epsilon must be a real number, got 1j"),
    ("epsilon", np.complex64(1j), TypeError, "epsilon must be a real number, got np.complex64"),
    ("epsilon", np.array(1 + 0j), TypeError, "epsilon must be a real number, got array"),
    ("momentum", np.timedelta64(1, "s"), TypeError, "momentum must be a real number, got np.timedelta64"),
    ("axis", 2, ValueError, "axis must be in -2 to 1 .*, got 2"),
    ("axis", -3, ValueError, "axis must be in -2 to 1 .*, got -3"),
    ("axis", (0, 0), ValueError, r"axis must name each axis once, got \(0, 0\)"),
    ("axis", (0, 5), ValueError, "axis"),
    ("axis", (), ValueError, "axis must name at least one axis"),
    ("axis", 1.0, TypeError, "axis must be an int or a tuple of ints, got 1.0"),
    ("axis", True, TypeError, "axis must be an int or a tuple of ints, got True"),
    ("axis", (0, 1.0), TypeError, "axis must be an int or a tuple of ints"),
    ("axis", "1", TypeError, "axis must be an int or a tuple of ints, got '1'"),
    ("axis", None, TypeError, "axis must be an int or a tuple of ints, got None"),
    ("layout", "NCWH", ValueError, "layout must be one of .*NCHW.*'NCWH'"),
    ("layout", "NCHW", ValueError, "NCHW"),
    ("layout", 1, TypeError, "layout"),
    ("ddof", 2, ValueError, "ddof must be 0 or 1, got 2"),
    ("ddof", -1, ValueError, "ddof must be 0 or 1, got -1"),
    ("ddof", 0.5, (TypeError, ValueError), "ddof must be 0 or 1"),
    ("ddof", np.array([1]), TypeError, r"ddof must be 0 or 1, got array\(\[1\]\)"),
    ("out", np.ones((4, C), f64), TypeError, "out must have dtype float32, got float64"),
    ("out", np.ones((4, C), np.int32), TypeError, "out must have dtype float32, got int32"),
    ("out", np.ones((4, C + 1), f32), ValueError, r"out must have shape \(4, 6\), got \(4, 7\)"),
    ("out", np.ones((C, 4), f32), ValueError, r"out must have shape \(4, 6\), got \(6, 4\)"),
    ("out", np.ones((1, 4, C), f32), ValueError, r"out must have shape \(4, 6\), got \(1, 4, 6\)"),
    ("out", read_only(np.ones((4, C), f32)), ValueError, "out must be writ.*read-only"),
    ("out", [[1.0] * C] * 4, TypeError, "out must be .*list"),
    ("out", np.broadcast_to(np.ones(C, f32), (4, C)), ValueError, "out"),
    ("mask", np.ones(4), TypeError, "mask"),
]


def ids(case):
    name, value = case[:2]
    shown = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)[:40]
    return f"{name}={shown}-{case[3][:12]}"


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG, ids=[ids(w) for w in WRONG])
@pytest.mark.parametrize("function", [batch_norm, batch_norm_forward], ids=lambda f: f.__name__)
def test_a_wrong_argument_changes_nothing(function, name, value, error, message):
    arguments = call() | {name: value}
    before = snapshot(arguments)
    x = arguments.pop("x")
    with pytest.raises(error) as caught:
        function(x, **arguments)
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    if isinstance(error, type):
        assert type(caught.value) is error  # not a subclass such as numpy's AxisError or UnicodeError
    assert unchanged(before)


@pytest.mark.parametrize("name", ["moving_mean", "moving_variance"])
def test_inference_needs_both_moving_arrays(name):
    arguments = call() | {name: None, "training": False}
    x = arguments.pop("x")
    with pytest.raises(ValueError, match=name):
        batch_norm(x, **arguments)
    with pytest.raises(ValueError, match="moving_mean"):
        batch_norm(x)


def test_inference_accepts_read_only_moving_arrays():
    arguments = call() | {"training": False}
    x = arguments.pop("x")
    expected = batch_norm(x, **arguments).copy()
    read_only(arguments["moving_mean"]), read_only(arguments["moving_variance"])
    assert (batch_norm(x, **arguments) == expected).all()
    arguments["training"], arguments["update"] = True, False
    batch_norm(x, **arguments)


def test_everything_behind_x_is_keyword_only():
    for function in (batch_norm, batch_norm_forward, normalize, moments):
        with pytest.raises(TypeError, match="positional"):
            function(np.ones((4, C), f32), *[np.ones(C, f32)] * 3)


@pytest.mark.parametrize("moving_dtype", [f32, f64])
@pytest.mark.parametrize("dtype", [f32, f64])
def test_moving_arrays_of_either_dtype_and_any_stride_are_updated_in_place(dtype, moving_dtype):
    x = cases.normal((50, C), dtype, mean=2)
    mean, variance = cases.moving(C, moving_dtype)
    for views in (
        (mean, variance),
        (np.repeat(mean, 3)[::3], np.repeat(variance, 2)[::2]),
        (mean[::-1],) * 2,
    ):
        a, b = (np.array(v)[::-1][::-1] if v.flags.c_contiguous else v for v in views)
        if views[0] is views[1]:  # reversed memory, not the same array twice
            a, b = mean[::-1].copy()[::-1], variance[::-1].copy()[::-1]
            a[...], b[...] = mean, variance
        batch_norm(x, moving_mean=a, moving_variance=b, training=True, momentum=0.75)
        np.testing.assert_allclose(a, 0.75 * mean + 0.25 * x.mean(0, f64), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(b, 0.75 * variance + 0.25 * x.var(0, f64), rtol=1e-6)
        assert a.dtype == b.dtype == moving_dtype


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.float16, f64, ">f4"])
def test_gamma_and_beta_of_another_real_dtype_are_converted(dtype):
    x = cases.normal((20, C))
    values = np.array([1, 0, 1, 1, 0, 1]).astype(dtype)
    y = batch_norm(x, gamma=values, beta=values, training=True)
    expected = batch_norm(x, gamma=values.astype(f32), beta=values.astype(f32), training=True)
    assert y.dtype == f32
    assert (y == expected).all()


# -- the other functions -----------------------------------------------------------------------------------


def cache_of(x=None):
    return batch_norm_forward(cases.normal((4, C)) if x is None else x, training=True)[1]


BACKWARD = [
    (np.ones((4, C + 1), f32), {}, ValueError, r"dy must have shape \(4, 6\), got \(4, 7\)"),
    (np.ones((C, 4), f32), {}, ValueError, r"dy must have shape \(4, 6\), got \(6, 4\)"),
    (np.ones((4, C), f64), {}, TypeError, "dy must have dtype float32, got float64"),
    (np.ones((4, C), int), {}, TypeError, f"dy must be {TYPES}, got int64"),
    (
        np.ones((4, C), f32),
        {"out": np.ones((4, C), f64)},
        TypeError,
        "out must have dtype float32, got float64",
    ),
    (np.ones((4, C), f32), {"out": np.ones((3, C), f32)}, ValueError, r"out must have shape \(4, 6\)"),
    (np.ones((4, C), f32), {"out": read_only(np.ones((4, C), f32))}, ValueError, "read-only"),
]


@pytest.mark.parametrize(("dy", "options", "error", "message"), BACKWARD)
def test_backward(dy, options, error, message):
    before = snapshot(options)
    with pytest.raises(error, match=message):
        batch_norm_backward(dy, cache_of(), **options)
    assert unchanged(before)


@pytest.mark.parametrize("cache", [None, (1, 2), np.ones(3), "cache"])
def test_a_cache_that_is_none(cache):
    with pytest.raises(TypeError, match="cache"):
        batch_norm_backward(np.ones((4, C), f32), cache)


NORMALIZE = [
    ({"mean": np.zeros(5)}, ValueError, r"mean must have shape \(6,\), got \(5,\)"),
    ({"variance": np.ones(7)}, ValueError, r"variance must have shape \(6,\), got \(7,\)"),
    ({"variance": np.ones((6, 1))}, ValueError, r"variance must have shape \(6,\), got \(6, 1\)"),
    ({"mean": None}, (TypeError, ValueError), "mean"),
    ({"mean": np.zeros(6, complex)}, TypeError, "mean must have a real dtype .*complex128"),
    ({"gamma": np.ones(5)}, ValueError, r"gamma must have shape \(6,\), got \(5,\)"),
    ({"epsilon": -1.0}, ValueError, "epsilon must be"),
    ({"out": np.ones((3, C), f32)}, ValueError, r"out must have shape \(4, 6\)"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), NORMALIZE)
def test_normalize(wrong, error, message):
    arguments = {"x": cases.normal((4, C)), "mean": np.zeros(C), "variance": np.ones(C)} | wrong
    with pytest.raises(error, match=message):
        normalize(arguments.pop("x"), arguments.pop("mean"), arguments.pop("variance"), **arguments)


UPDATE = [
    ({"moving_mean": np.ones(5, f32)}, ValueError, "must have shape"),
    ({"moving_mean": read_only(np.ones(C, f32))}, ValueError, "moving_mean must be writ.*read-only"),
    (
        {"moving_variance": np.ones(C, int)},
        TypeError,
        "moving_variance must be float32 or float64.*, got int64",
    ),
    ({"mean": np.ones(5)}, ValueError, r"mean must have shape \(6,\), got \(5,\)"),
    ({"variance": np.ones(7)}, ValueError, r"variance must have shape \(6,\), got \(7,\)"),
    ({"momentum": 2.0}, ValueError, "momentum must be"),
    ({"ddof": 1}, ValueError, "count"),
    ({"ddof": 3, "count": 5}, ValueError, "ddof must be 0 or 1, got 3"),
    ({"ddof": 1, "count": -1}, ValueError, "count must be"),
    ({"ddof": 1, "count": "many"}, TypeError, "count must be"),
    ({"momentum": None, "batches": np.array([1])}, TypeError, r"batches must be an integer, got array\(\[1\]\)"),
    ({"ddof": 1, "count": -1.5}, ValueError, "count must be finite and at least 0, got -1.5"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), UPDATE)
def test_update_moving(wrong, error, message):
    mean, variance = cases.moving(C)
    arguments = {
        "moving_mean": mean,
        "moving_variance": variance,
        "mean": np.ones(C),
        "variance": np.ones(C),
        "momentum": 0.9,
    } | wrong
    before = snapshot(arguments)
    with pytest.raises(error, match=message):
        update_moving(**arguments)
    assert unchanged(before)


def test_update_moving_with_one_array_twice():
    both = np.ones(C)
    with pytest.raises(ValueError, match="overlap"):
        update_moving(both, both, np.ones(C), np.ones(C), momentum=0.5)
    assert (both == 1).all()


def test_moments_of_what_is_no_array():
    with pytest.raises(TypeError, match="mean must be convertible to a NumPy array, got list"):
        Moments.from_dict({"count": 1, "mean": [[1.0], 2.0], "m2": [1.0]})


def test_moments_of_other_channels():
    s = Moments(3)
    for other in (lambda: s.update(np.ones((4, 5))), lambda: s.merge(Moments(5)), lambda: s + Moments(2)):
        with pytest.raises(ValueError, match="3"):
            other()
    with pytest.raises(TypeError):
        s.merge(np.ones(3))
    with pytest.raises(TypeError):
        s + 1


@pytest.mark.parametrize("bad", [-1, 0.5, "3", np.array([3])], ids=str)
def test_number_of_features(bad):
    for make in (Moments, BatchNorm):
        with pytest.raises((TypeError, ValueError), match="num_features"):
            make(bad)


LAYER = [
    ({"momentum": 1.5}, ValueError, "momentum must be"),
    ({"momentum": "0.9"}, TypeError, "momentum must be"),
    ({"epsilon": -1.0}, ValueError, "epsilon must be"),
    ({"ddof": 2}, ValueError, "ddof must be 0 or 1, got 2"),
    ({"dtype": np.int32}, TypeError, "dtype must be float32 or float64, got int32"),
    ({"dtype": np.float16}, TypeError, "dtype must be float32 or float64, got float16"),
    ({"layout": "HWC"}, ValueError, "layout must be one of"),
    ({"dtype": [("a", "f4"), ("a", "f4")]}, TypeError, "dtype must be float32 or float64, got "),
    ({"dtype": "nonsense"}, TypeError, "dtype must be float32 or float64, got 'nonsense'"),
    ({"renorm": True, "renorm_clipping": {"rmax": [[1], [2, 3]]}}, TypeError, "rmax of renorm_clipping must be a real"),
    ({"layout": ["NC"]}, TypeError, "layout must be a string or None"),
    ({"axis": "1"}, TypeError, "axis"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), LAYER)
def test_layer_options(wrong, error, message):
    with pytest.raises(error, match=message):
        BatchNorm(C, **wrong)


@pytest.mark.parametrize(("wrong", "error"), [(1.5, ValueError), (-0.1, ValueError), ("0.9", TypeError)])
def test_a_momentum_that_is_assigned(wrong, error):
    """It is checked then: the next update would extrapolate, and the layer's file could not be loaded."""
    bn = BatchNorm(C, momentum=0.5)
    with pytest.raises(error, match="momentum must be"):
        bn.momentum = wrong
    assert bn.momentum == 0.5
    bn.momentum = None
    assert bn.get_config()["momentum"] is None


def test_a_layer_whose_axis_and_layout_disagree():
    """Found at the first call at the latest: whether 2 is -2 depends on the rank."""
    with pytest.raises(ValueError, match="layout"):
        BatchNorm(C, axis=2, layout="NCHW")(np.ones((2, C, 3, 3)), True)


def test_the_array_of_other_functions_has_its_own_name():
    memory, bn = np.zeros((10, C), f32), BatchNorm(C)
    for undo in (bn.denormalize, lambda y, **options: denormalize(y, np.zeros(C), np.ones(C), **options)):
        with pytest.raises(ValueError, match="y must have at least 1 dimension, got a scalar"):
            undo(f32(3))
        with pytest.raises(ValueError, match="out must be y itself or not share memory with it, got a partial overlap"):
            undo(memory[1:], out=memory[:-1])
    with pytest.raises(ValueError, match="y must have 4 dimensions with layout 'NCHW', got 2"):
        denormalize(memory, np.zeros(C), np.ones(C), layout="NCHW")
    with pytest.raises(ValueError, match="weight must have at least 1 dimension, got a scalar"):
        fold(f32(3), None, bn, axis=0)


RAGGED = [
    ("gamma_initializer", lambda bn, x: bn(x)),
    ("adjustment", lambda bn, x: bn(x, True)),
    ("gamma_constraint", lambda bn, _: bn.apply_constraints()),
    ("gamma_regularizer", lambda bn, _: bn.regularization_loss()),
]


@pytest.mark.parametrize(("name", "call"), RAGGED, ids=lambda v: v if isinstance(v, str) else "")
def test_a_function_that_returns_no_array(name, call):
    ragged = [[1.0], 2.0]
    channels = None if name == "gamma_initializer" else C
    bn = BatchNorm(channels, **{name: lambda *_: (ragged, None) if name == "adjustment" else ragged})
    with pytest.raises(TypeError, match=f"{name} must be convertible to a NumPy array, got list"):
        call(bn, cases.normal((4, C)))


@pytest.mark.parametrize(
    ("read", "name"),
    [(BatchNorm().load_state_dict, "state_dict"), (Moments.from_dict, "state"), (BatchNorm.from_config, "config")],
)
def test_what_is_no_mapping(read, name):
    for wrong in (None, 5, ["gamma"]):
        with pytest.raises(TypeError, match=f"{name} must be a mapping, got {type(wrong).__name__}"):
            read(wrong)


def test_fold_arguments():
    bn = BatchNorm(4)
    bn(cases.normal((20, 4)), True)
    with pytest.raises(ValueError, match=r"weight must have .*4.*"):
        fold(np.ones((3, 5), f32), None, bn, axis=1)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), got \(3,\)"):
        fold(np.ones((3, 4), f32), np.ones(3, f32), bn, axis=1)
    with pytest.raises(ValueError, match="axis must be in"):
        fold(np.ones((3, 4), f32), None, bn, axis=2)
    with pytest.raises(TypeError, match="bn must be a BatchNorm"):
        fold(np.ones((3, 4), f32), None, "bn", axis=1)
