"""The straight way from tensors to a driver: when it is taken, and that nobody can tell."""

import pytest

torch = pytest.importorskip("torch")

import fastbn.torch  # noqa: E402
from fastbn.torch import _eager, functional  # noqa: E402

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="DLPack's exchange API came with PyTorch 2.10"
)
LAYOUTS = [torch.contiguous_format, torch.channels_last]
ACTIVATIONS = [None, "relu", "silu", ("leaky_relu", -0.5)]


def batch(layout, *shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=layout)


def assert_same_bits_as_the_full_way(shape, dtype, layout, training, with_residual, activation):
    torch.manual_seed(0)
    x, residual, dy = (batch(layout, *shape, dtype=dtype).requires_grad_() for _ in range(3))
    weight, bias = (torch.randn(shape[1], dtype=dtype).requires_grad_() for _ in range(2))
    inputs = [x, weight, bias, *[residual][: 1 if with_residual else 0]]
    results = []
    for way in ("straight", "full"):
        mean, variance = torch.zeros(shape[1], dtype=dtype), torch.ones(shape[1], dtype=dtype)
        other = residual if with_residual else None
        if way == "straight":
            y = _eager.normalize(x, weight, bias, other, mean, variance, None, training, 0.1, 1e-5, activation)
            assert y is not None
        else:
            y = functional.dispatch(x, mean, variance, weight, bias, training, 0.1, 1e-5, activation, other)
        assert y.stride() == x.stride()
        results.append((y, mean, variance, *torch.autograd.grad(y, inputs, dy)))
    for straight, full in zip(*results):
        assert torch.equal(straight, full)
        assert straight.dtype is full.dtype


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_as_the_full_way(dtype, layout, training, with_residual, activation):
    assert_same_bits_as_the_full_way((5, 6, 7, 9), dtype, layout, training, with_residual, activation)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(128, 64, 8, 8), (33, 64, 17, 17)])
def test_the_same_bits_of_what_is_stored_elsewhere(shape, layout, with_residual, activation):
    """Where cores have 2 MB of cache, results of training go past the caches from 2 MB, by the full way from 8."""
    assert_same_bits_as_the_full_way(shape, torch.float32, layout, True, with_residual, activation)


def test_what_it_leaves_to_the_full_way():
    bn = fastbn.torch.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5)
    negated = torch.randn(4, 3, 5, 5, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    for other in (x[:, :, ::2], x.half(), negated, x.to_sparse(), x.to("meta"), x[:, :, 0], x[:, :2]):
        assert _eager.call(bn, other, None) is None
    assert bn.num_batches_tracked == 0
    assert not bn.running_mean.any()
    assert _eager.call(bn, x, None) is not None
    assert bn.num_batches_tracked == 1
    expected = torch.nn.BatchNorm2d(3)(negated)
    torch.testing.assert_close(fastbn.torch.BatchNorm2d(3)(negated), expected)


def test_a_subclass_checks_for_itself():
    class Check:
        def _check_input_dim(self, input):
            raise ValueError("never")

    class Strict(fastbn.torch.BatchNorm2d):
        _check_input_dim = Check._check_input_dim

    class Mixed(Check, fastbn.torch.BatchNorm2d):
        pass

    class Derived(Mixed):
        pass

    for kind in (Strict, Mixed, Derived):
        with pytest.raises(ValueError, match="never"):
            kind(3)(torch.randn(4, 3, 5, 5))


def test_results_of_blocks_live_as_long_as_somebody_looks():
    bn = fastbn.torch.BatchNorm2d(4).eval()
    x = torch.randn(8, 4, 192, 192)  # 4.5 MB: in a block
    kept = bn(x)[0]
    before = kept.clone()
    starts = {bn(torch.randn_like(x)).data_ptr() % (1 << 21) for _ in range(40)}
    assert torch.equal(kept, before)
    assert len(starts) > 4  # not all at the same distance from a huge page
    assert all(start % 64 == 0 for start in starts)


@pytest.mark.parametrize("other", ["x", "weight", "bias", "residual", "expanded"])
@pytest.mark.parametrize("name", ["mean", "variance"])
def test_running_statistics_that_lie_in_an_input_go_the_full_way(name, other):
    """Of many channels some learn before others are read."""
    x, residual = torch.randn(4, 4096), torch.randn(4, 4096)
    given = {
        "weight": torch.ones(4096),
        "bias": torch.zeros(4096),
        "mean": torch.zeros(4096),
        "variance": torch.ones(4096),
    }
    if other in ("x", "residual"):
        given[name] = (x if other == "x" else residual)[1]
    elif other == "expanded":
        given["bias"] = given[name][7:8].expand(4096)
    else:
        given[other] = given[name]
    weight, bias, mean, variance = given.values()
    assert _eager.normalize(x, weight, bias, residual, mean, variance, None, True, 0.1, 1e-5, "relu") is None
