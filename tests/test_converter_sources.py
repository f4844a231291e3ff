"""Forms in which weights reach the converters: flat names, lists of axes, counters and prefixes of other types."""

from __future__ import annotations

import numpy as np
import pytest
from weights_cases import GAMMA, LINEN, MEAN, ONNX, TF1, TORCH, VARIANCE, C, prefixed

import fastbn
from fastbn.compat import (
    from_flax,
    from_flax_many,
    from_keras,
    from_onnx,
    from_tf1,
    from_tf1_many,
    from_torch,
    from_torch_many,
    load_safetensors,
    save_safetensors,
    to_flax,
    to_torch,
)

FLAT = {f"{collection}/block/bn/{n}": v for collection, tree in LINEN.items() for n, v in tree.items()}


@pytest.mark.parametrize("key", [str, lambda name: tuple(name.split("/"))], ids=["slashes", "tuples"])
@pytest.mark.parametrize("others", [{}, {"cache/block/bn/mean": MEAN}, {"params/Dense_0/kernel": MEAN}])
def test_flat_variables_of_linen(key, others):
    """As ``flax.traverse_util.flatten_dict`` makes them, with sep="/" for files; gamma and beta were lost."""
    source = {key(name): value for name, value in (FLAT | others).items()}
    (made,) = from_flax_many(source).values()
    for bn in (made, from_flax(source, "block/bn")):
        np.testing.assert_array_equal(bn.gamma, GAMMA)
        np.testing.assert_array_equal(bn.moving_mean, MEAN)
    assert list(from_flax_many(source)) == ["block/bn"]
    assert from_flax_many({"params/Dense_0/kernel": MEAN}) == {}


@pytest.mark.parametrize("axis", [[1, -1], (1, -1)])
def test_tf1_takes_the_list_of_axes_of_the_layer(axis):
    wide = np.arange(1.0, 13.0).reshape(1, 3, 1, 4)
    bn = from_tf1({"bn/moving_mean": wide, "bn/moving_variance": wide}, axis=axis)
    assert bn.axis == (1, -1)
    np.testing.assert_array_equal(bn.moving_mean, wide[0, :, 0])


@pytest.mark.parametrize("counter", [7.0, np.float32(7), np.array([7], np.float16)])
def test_counters_that_a_conversion_made_floats(counter):
    """PyTorch loads a state of which all tensors were cast; so does from_torch."""
    assert from_torch(TORCH | {"num_batches_tracked": counter}).batches == 7


@pytest.mark.parametrize("counter", [7.5, -1.0, np.nan, np.inf])
def test_counters_that_count_nothing(counter):
    with pytest.raises(ValueError, match=r"^num_batches_tracked must be one integer, at least 0, got "):
        from_torch(TORCH | {"num_batches_tracked": counter})


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda p: from_torch_many(prefixed(TORCH, "a."), p), "prefix"),
        (lambda p: to_torch(fastbn.BatchNorm(C), prefix=p), "prefix"),
        (lambda p: from_tf1_many(TF1, p), "scope"),
        (lambda p: from_flax_many(LINEN, p), "path"),
        (lambda p: to_flax(fastbn.BatchNorm(C), path=p), "path"),
    ],
)
@pytest.mark.parametrize("wrong", [5, None])
def test_prefixes_are_strings(call, name, wrong):
    with pytest.raises(TypeError, match=rf"^{name} must be a string, got {wrong}$"):
        call(wrong)


@pytest.mark.parametrize("metadata", ["np", [("format", "np")], 3])
def test_metadata_that_are_no_mapping(tmp_path, metadata):
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    with pytest.raises(TypeError, match=r"^metadata must be a mapping of strings to strings, got "):
        save_safetensors(path, TORCH, metadata=metadata)
    assert not path.exists()


def test_a_name_that_the_format_keeps_for_itself(tmp_path):
    """The file could not be read."""
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    save_safetensors(path, TORCH)
    with pytest.raises(ValueError, match=r"^arrays must have other names than the header's, got '__metadata__'$"):
        save_safetensors(path, {"__metadata__": MEAN})
    assert set(load_safetensors(path)) == set(TORCH)


def test_norms_along_a_tuple_of_one_axis():
    """``MaxNorm(axis=(0,))`` has a tuple in the configuration of a live layer."""
    config = {"gamma_constraint": {"class_name": "MaxNorm", "config": {"max_value": 3.0, "axis": (0,)}}}
    assert from_keras([GAMMA, MEAN, MEAN, VARIANCE], config).gamma_constraint == ("max_norm", 3.0)


def test_onnx_nodes_by_a_number_of_numpy():
    helper = pytest.importorskip("onnx").helper
    nodes = [helper.make_node("BatchNormalization", ["X", *ONNX], [name], name) for name in ("a", "b")]
    ends = [[helper.make_tensor_value_info(name, 1, None)] for name in ("X", "b")]
    values = [helper.make_tensor(name, 1, value.shape, value) for name, value in ONNX.items()]
    model = helper.make_model(helper.make_graph(nodes, "graph", *ends, values))
    assert from_onnx(model, np.int64(1)).moving_mean.tolist() == MEAN.tolist()
    with pytest.raises(ValueError, match=r"^node must be less than 2, the number of BatchNormalization nodes, got 2$"):
        from_onnx(model, np.int64(2))


@pytest.mark.parametrize("module", [3, "BatchNorm"])
def test_modules_of_flax_have_its_arguments(module):
    with pytest.raises(TypeError, match=rf"^module must be a BatchNorm of flax, got {type(module).__name__}$"):
        from_flax(LINEN, module=module)
