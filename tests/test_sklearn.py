"""The scaler keeps every rule that scikit-learn has for a transformer, those that check_estimator leaves out too."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sklearn = pytest.importorskip("sklearn", minversion="1.6")
pytest.importorskip("scipy")

from sklearn import config_context  # noqa: E402
from sklearn.base import BaseEstimator, clone  # noqa: E402
from sklearn.compose import ColumnTransformer  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils import estimator_checks  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing  # noqa: E402

from fastbn.sklearn import BatchNormScaler  # noqa: E402

SCALERS = [
    BatchNormScaler(),
    BatchNormScaler(with_mean=False),
    BatchNormScaler(with_std=False),
    BatchNormScaler(epsilon=1e-3, momentum=0.9, gamma=2.0, beta=1.0),
]


@parametrize_with_checks(SCALERS)
def test_check_estimator(estimator, check):
    check(estimator)


LEFT_OUT = [
    "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
    "check_set_output_transform",
    "check_set_output_transform_pandas",
    "check_set_output_transform_polars",
    "check_global_output_transform_pandas",
    "check_global_set_output_transform_polars",
    "check_param_validation",
    "check_dataframe_column_names_consistency",
    "check_inplace_ensure_writeable",
    "check_get_feature_names_out_error",
    "check_all_zero_sample_weights_error",
    "check_transformer_preserve_dtypes",
    "check_readonly_memmap_input",
]


@pytest.mark.filterwarnings("ignore:X .* feature names")  # the checks mix frames and arrays
@pytest.mark.parametrize("name", LEFT_OUT)
@pytest.mark.parametrize("copy", [True, False], ids=["copy", "in place"])
def test_checks_that_check_estimator_leaves_out(name, copy):
    if not copy and "output" in name:
        pytest.skip("these checks transform the same data again: in place, StandardScaler fails them too")
    check = getattr(estimator_checks, name, None)
    if check is None:
        pytest.skip(f"scikit-learn {sklearn.__version__} has no {name}")
    for needed in ("pandas", "polars"):
        if needed in name:
            pytest.importorskip(needed)
    try:
        check("BatchNormScaler", BatchNormScaler(copy=copy))
    except estimator_checks.SkipTest as skipped:
        pytest.skip(str(skipped))


@pytest.mark.slow
def test_scikit_learns_own_tests_of_standard_scaler():
    """All of them, with our scaler in place of theirs."""
    tests = Path(sklearn.__file__).parent / "preprocessing" / "tests" / "test_data.py"
    if not tests.exists():
        pytest.skip("scikit-learn is installed without its tests")
    here = Path(__file__).parent
    program = f"import sys, pytest; sys.path.insert(0, {str(here)!r}); sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--import-mode=importlib"]
    options += ["-p", "replace_standard_scaler", "-k", "scaler or inverse_transform", str(tests)]
    run = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert int(run.stdout.rsplit(" passed")[0].split()[-1]) > 100


def test_the_arguments_of_standard_scaler():
    ours, theirs = BatchNormScaler().get_params(), StandardScaler().get_params()
    assert {name: ours[name] for name in theirs} == theirs
    scaler = BatchNormScaler().fit(np.eye(3))
    for name in vars(StandardScaler().fit(np.eye(3))):
        assert name.startswith("_") or hasattr(scaler, name), name


def test_in_a_pipeline_and_a_column_transformer(rng):
    x = rng.normal(5, 3, (60, 4)).astype(np.float32)
    y = x[:, 0] > 5
    ours = make_pipeline(BatchNormScaler(), LogisticRegression()).fit(x, y)
    theirs = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y)
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-4)
    columns = ColumnTransformer([("scale", BatchNormScaler(), [0, 2])], remainder="passthrough")
    result = columns.fit_transform(x)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[:, :2], StandardScaler().fit_transform(x[:, [0, 2]]), atol=1e-6)


def test_parameters_are_validated_unless_scikit_learn_is_told_not_to(rng):
    x = rng.normal(size=(20, 2))
    scaler = BatchNormScaler(copy="yes")
    calls = [scaler.fit, scaler.partial_fit, lambda x: scaler.merge(BatchNormScaler().fit(x))]
    with config_context(skip_parameter_validation=True):
        for call in calls:
            call(x)
    for call in calls:  # also where something was fitted before
        with pytest.raises(ValueError, match="The 'copy' parameter of BatchNormScaler must be"):
            call(x)


class MetaOf(BaseEstimator):
    """An estimator that hands on what it gets to another."""

    def __init__(self, estimator=None):
        self.estimator = estimator

    def get_metadata_routing(self):
        mapping = MethodMapping().add(caller="partial_fit", callee="partial_fit")
        return MetadataRouter(owner="MetaOf").add(estimator=self.estimator, method_mapping=mapping)


def test_metadata_routing(rng):
    x, y, w = rng.normal(size=(20, 2)), np.arange(20) % 2, rng.uniform(0.1, 3, 20)
    with config_context(enable_metadata_routing=True):
        scaler = BatchNormScaler().set_fit_request(sample_weight=True)
        model = LogisticRegression().set_fit_request(sample_weight=False)
        pipeline = make_pipeline(scaler, model).fit(x, y, sample_weight=w)
        assert scaler.get_metadata_routing().fit.requests["sample_weight"] is True
        stream = BatchNormScaler().set_partial_fit_request(sample_weight="w")
        routed = process_routing(MetaOf(stream), "partial_fit", w=w)
        stream.partial_fit(x, **routed.estimator.partial_fit)
        for method in ("transform", "inverse_transform"):
            assert "copy" in getattr(scaler.get_metadata_routing(), method).requests
    np.testing.assert_array_equal(stream.mean_, pipeline[0].mean_)
    np.testing.assert_allclose(pipeline[0].mean_, np.average(x, axis=0, weights=w))


@pytest.mark.parametrize("container", ["pandas", "polars"])
def test_frames_in_and_out(container, rng):
    library = pytest.importorskip(container)
    values = rng.normal(4, 2, (30, 2)).astype(np.float32)
    frame = library.DataFrame({"a": values[:, 0], "b": values[:, 1]})
    scaler = BatchNormScaler().set_output(transform=container).fit(frame)
    result = scaler.transform(frame)
    assert isinstance(result, library.DataFrame)
    assert list(result.columns) == ["a", "b"]
    assert list(scaler.feature_names_in_) == list(scaler.get_feature_names_out()) == ["a", "b"]
    assert np.asarray(result).dtype == np.float32
    # Frames hold columns: memory in another order than the array's, and so other roundings.
    np.testing.assert_allclose(np.asarray(result), BatchNormScaler().fit_transform(values), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="feature names"):
        scaler.partial_fit(library.DataFrame({"a": values[:, 0], "c": values[:, 1]}))


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_callbacks(method, rng):
    pytest.importorskip("sklearn.callback")
    events = []

    class Recorder:
        def setup(self, estimator, context):
            events.append("setup")

        def teardown(self, estimator, context):
            events.append("teardown")

        def on_fit_task_begin(self, estimator, context, *, X=None, y=None, metadata=None, fitted_estimator=None):
            events.append(("begin", X.shape, metadata))

        def on_fit_task_end(self, estimator, context, *, X=None, y=None, metadata=None, fitted_estimator=None):
            events.append(("end", fitted_estimator.transform(X).shape))

    x = rng.normal(size=(10, 2))
    scaler = BatchNormScaler().set_callbacks(Recorder())
    getattr(scaler, method)(x)
    assert events == ["setup", ("begin", (10, 2), {"sample_weight": None}), ("end", (10, 2)), "teardown"]
    events.clear()
    with pytest.raises(ValueError, match="infinity"):
        getattr(scaler, method)(np.full((2, 2), np.inf))
    assert events[-1] == "teardown"


def test_copies(rng):
    """clone forgets, pickle and copy keep."""
    x = rng.normal(1e15, 1, (50, 3))
    scaler = BatchNormScaler(gamma=[1.0, 2.0, 3.0]).fit(x)
    assert not hasattr(clone(scaler), "mean_")
    again = pickle.loads(pickle.dumps(scaler))
    np.testing.assert_array_equal(again.transform(x), scaler.transform(x))
    np.testing.assert_array_equal(again.partial_fit(x).var_, scaler.partial_fit(x).var_)


def test_without_scikit_learn():
    program = "import sys; sys.modules['sklearn'] = None; import fastbn.sklearn"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert 'fastbn.sklearn needs scikit-learn 1.6 or newer: pip install "fastbn[sklearn]"' in run.stderr
