"""BatchNormScaler and other libraries: tensors, array API, ONNX by way of a layer, a network of skorch."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import reference as ref
from scaler_cases import table

pytest.importorskip("sklearn", minversion="1.6")

from fastbn.sklearn import BatchNormScaler


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
def test_tensors(dtype, rng):
    """What exports its memory (DLPack) keeps its type, and gives NumPy arrays."""
    torch = pytest.importorskip("torch")
    values = rng.integers(0, 50, (40, 3)).astype(dtype)
    x = torch.from_numpy(values.copy())
    scaler, plain = BatchNormScaler().fit(x), BatchNormScaler().fit(values)
    y = scaler.transform(x)
    assert type(y) is np.ndarray
    ref.assert_same_bits(y, plain.transform(values))
    np.testing.assert_array_equal(scaler.var_, plain.var_)
    np.testing.assert_array_equal(x.numpy(), values)


@pytest.mark.parametrize("kinds, wanted", [
    (("float32", "Float32"), np.float32), (("Float32", "float16"), np.float32), (("Float32", "Float64"), np.float64),
    (("float32[pyarrow]", "float32[pyarrow]"), np.float32), (("halffloat[pyarrow]", "halffloat[pyarrow]"), np.float16),
    (("float32[pyarrow]", "float16"), np.float32), (("float32[pyarrow]", "int8"), np.float64),
], ids=str)  # fmt: skip
def test_columns_of_pandas_keep_their_type(kinds, wanted, rng):
    """Nullable and Arrow columns, too, and NaN is what is missing in them."""
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    values = rng.integers(0, 50, (40, 2)).astype(wanted)
    frame = pandas.DataFrame(values, columns=["a", "b"]).astype(dict(zip("ab", kinds, strict=True)))
    if kinds[0] != "float32":
        frame.iloc[3, 0] = pandas.NA
        values[3, 0] = np.nan
    y = BatchNormScaler().fit_transform(frame)
    assert y.dtype == wanted
    tolerance = 4 * np.finfo(wanted).eps
    np.testing.assert_allclose(y, BatchNormScaler().fit_transform(values), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kinds, wanted", [
    (("Float16", "Float16"), np.float16), (("Float16", "Float32"), np.float32), (("Float32", "Int8"), np.float64),
], ids=str)  # fmt: skip
def test_columns_of_polars_keep_their_type(kinds, wanted, rng):
    polars = pytest.importorskip("polars", minversion="1.36")
    values = rng.integers(0, 50, (40, 2)).astype(wanted)
    frame = polars.DataFrame({n: values[:, i].tolist() for i, n in enumerate("ab")})
    frame = frame.cast({n: getattr(polars, kind) for n, kind in zip("ab", kinds, strict=True)})
    y = BatchNormScaler().fit_transform(frame)
    assert y.dtype == wanted
    tolerance = 4 * np.finfo(wanted).eps
    np.testing.assert_allclose(y, BatchNormScaler().fit_transform(values), rtol=tolerance, atol=tolerance)


def test_as_a_layer(rng):
    x = table(rng, np.float32)
    for options in ({}, {"with_mean": False, "gamma": 3.0}, {"with_std": False, "beta": 2.0}, {"epsilon": 0.1}):
        scaler = BatchNormScaler(**options).fit(x)
        layer = scaler.to_batch_norm()
        np.testing.assert_allclose(layer(x), scaler.transform(x), rtol=1e-5, atol=1e-5)
    assert layer(x).dtype == np.float32
    assert scaler.to_batch_norm("float32").moving_mean.dtype == np.float32


@pytest.mark.parametrize("size", [1e-30, 1e-21, 1e20, 1e30])
def test_a_layer_of_data_whose_variance_is_out_of_range(size, rng):
    """The square of a deviation leaves the range of float32 long before the deviation does."""
    x = (size * rng.normal(size=(50, 3))).astype(np.float32)
    x[:, 1] /= np.float32(size)
    scaler = BatchNormScaler(gamma=2.0, beta=1.0).fit(x)
    np.testing.assert_allclose(scaler.to_batch_norm("float32")(x), scaler.transform(x), rtol=1e-5, atol=1e-5)


def test_to_onnx(tmp_path, rng):
    """The recipe: a scaler as a layer, and that as an ONNX model."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    compat = pytest.importorskip("fastbn.compat")
    if not hasattr(compat, "to_onnx"):
        pytest.skip("this fastbn has no ONNX export")
    x = table(rng, np.float32)
    scaler = BatchNormScaler().fit(x)
    model = compat.to_onnx(scaler.to_batch_norm("float32"), rank=2)
    onnx.checker.check_model(model)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(y, scaler.transform(x), rtol=1e-3, atol=2e-3)  # the runtime folds: x * a + b


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of other packages
def test_before_a_network_of_skorch(rng):
    """The recipe: float32 goes through the pipeline as it is."""
    torch = pytest.importorskip("torch")
    skorch = pytest.importorskip("skorch")
    from sklearn.pipeline import make_pipeline

    x = rng.normal(50, 10, (64, 4)).astype(np.float32)
    y = (x[:, 0] > 50).astype(np.int64)
    torch.manual_seed(0)
    net = skorch.NeuralNetClassifier(
        torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Softmax(dim=-1)), max_epochs=30, lr=0.5, verbose=0,
        train_split=None, iterator_train__shuffle=False,
    )  # fmt: skip
    assert make_pipeline(BatchNormScaler(), net).fit(x, y).score(x, y) > 0.8


@pytest.mark.parametrize("library", ["array_api_strict", "torch"])
def test_arrays_of_others_under_array_api_dispatch(library):
    """They give NumPy arrays there too."""
    pytest.importorskip(library)
    program = f"""if True:
        import numpy as np, {library} as xp
        from sklearn import config_context
        from fastbn.sklearn import BatchNormScaler
        x = np.float32([[1, 2], [3, 6]])
        with config_context(array_api_dispatch=True):
            scaler = BatchNormScaler().fit(xp.asarray(x), sample_weight=xp.asarray([1.0, 3.0]))
            for y in (scaler.transform(xp.asarray(x)), scaler.partial_fit(xp.asarray(x)).fit_transform(xp.asarray(x))):
                assert type(y) is np.ndarray and y.dtype == np.float32
            back = scaler.inverse_transform(xp.asarray(y))
        np.testing.assert_array_equal(back, x)"""
    environment = os.environ | {"SCIPY_ARRAY_API": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, env=environment)
