"""fastbn.torch computes what PyTorch's batch norm computes, with each of its flags: results, gradients, statistics.

PyTorch's own modules are the reference for behaviour; for values that is PyTorch in float64.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch_cases import FORMATS, PAIRS, TOLERANCE, batch, close  # noqa: E402

import fastbn  # noqa: E402
import fastbn.torch as ft  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("torch_seed"),
    # PyTorch uses parts of itself that it deprecates.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]
SHAPES = [(4, 3), (7, 5, 9), (4, 8, 10, 10), (4, 1, 9, 9), (4, 9, 1, 1), (2, 40, 7, 7), (3, 4, 2, 5, 6)]


def pair(shape, dtype=torch.float32, **options):
    """PyTorch's module, in float64, and fastbn's of the same parameters."""
    plain, fast = PAIRS[len(shape)]
    fast = fast(shape[1], dtype=dtype, **options)
    with torch.no_grad():
        for p in fast.parameters():
            p.uniform_(0.5, 1.5)
        if fast.running_mean is not None:
            fast.running_mean.normal_()
            fast.running_var.uniform_(0.5, 2.0)
    plain = plain(shape[1], dtype=torch.float64, **options)
    plain.load_state_dict(fast.state_dict())
    return plain, fast


def gradients(module, x, dy):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(dy)
    return y, [x.grad, *(p.grad for p in module.parameters())]


def agree(plain, fast, x):
    """One step on both: results, gradients, statistics."""
    dy = torch.randn(x.shape, dtype=torch.float64).to(x.dtype)
    y, wanted = gradients(plain, x.double(), dy.double())
    z, got = gradients(fast, x, dy)
    assert z.dtype == x.dtype
    close(z, y)
    for g, w in zip(got, wanted):
        assert g.dtype == (x.dtype if g.shape == x.shape else fast.weight.dtype)
        close(g, w, x.dtype)
    for (name, g), w in zip(fast.named_buffers(), plain.buffers()):
        if name == "num_batches_tracked":
            assert g == w
        else:
            close(g, w)
    return z, got[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape, last", [(s, last) for s in SHAPES for last in (False, True)[: 1 + (len(s) in FORMATS)]], ids=str
)
def test_training_and_inference_are_pytorchs(shape, last, dtype):
    plain, fast = pair(shape, dtype)
    x = batch(shape, dtype, last)
    for training in (True, True, False):
        plain.train(training)
        fast.train(training)
        z, dx = agree(plain, fast, x)
        reference = F.batch_norm(x, None, None, training=True)
        assert z.stride() == reference.stride()
        assert dx.stride() == reference.stride()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_small_data_with_float32_parameters(dtype):
    plain, fast = pair((4, 8, 10, 10), torch.float32)
    x = batch((4, 8, 10, 10), dtype)
    for training in (True, False):
        y = plain.train(training)(x.double())
        z = fast.train(training)(x)
        assert z.dtype == dtype
        close(z, y)
        close(fast.running_var, plain.running_var)


OPTIONS = [
    dict(zip(("momentum", "affine", "track_running_stats"), values))
    for values in itertools.product((0.1, 0.0, 1.0, None), (True, False), (True, False))
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", ((5, 3), (4, 3, 5, 5)), ids=str)
def test_flags(shape, options):
    plain, fast = pair(shape, **options)
    for step in range(5):
        training = step != 3
        plain.train(training)
        fast.train(training)
        agree(plain, fast, batch(shape))
    assert list(plain.state_dict()) == list(fast.state_dict())
    assert repr(plain) == repr(fast)


def test_without_a_bias():
    try:
        plain = nn.BatchNorm2d(3, bias=False)
    except TypeError:
        pytest.skip("PyTorch has this argument from 2.13 on")
    fast = ft.BatchNorm2d(3, bias=False)
    assert fast.bias is None
    agree(plain.double(), fast, batch((4, 3, 5, 5)))


@pytest.mark.parametrize("frozen", range(8))
@pytest.mark.parametrize("training", (True, False))
def test_gradients_of_some(training, frozen):
    """Whichever of input, weight and bias ask for a gradient get theirs, and no other."""
    x, weight, bias = batch((4, 3, 5, 5), torch.float64), torch.rand(3).double(), torch.rand(3).double()
    statistics = torch.zeros(3).double(), torch.ones(3).double()
    results = []
    for function in (F.batch_norm, ft.batch_norm):
        tensors = [t.clone().requires_grad_(not frozen >> i & 1) for i, t in enumerate((x, weight, bias))]
        y = function(tensors[0], *(s.clone() for s in statistics), *tensors[1:], training)
        assert y.requires_grad == (frozen != 7)
        if frozen != 7:
            y.square().sum().backward()
        results.append([t.grad for t in tensors])
    for wanted, got in zip(*results):
        assert (wanted is None) == (got is None)
        if got is not None:
            close(got, wanted)


def test_an_eval_mode_layer_has_gradients_of_constant_statistics():
    bn = ft.BatchNorm2d(3).eval()
    x = batch((2, 3, 4, 4)).requires_grad_()
    y = bn(x)
    bn.train()(x)  # moves the statistics; the gradient is of those that normalized
    y.sum().backward()
    close(x.grad, torch.full_like(x, 1 / np.sqrt(1 + 1e-5)))


def test_more_exact_than_pytorch():
    """At a mean of 1000 deviations: PyTorch's folded form loses three digits."""
    x = torch.randn(64, 4, 32, 32).add(1000)
    exact = F.batch_norm(x.double(), None, None, training=True)
    for format in (torch.contiguous_format, torch.channels_last):
        y = ft.batch_norm(x.contiguous(memory_format=format), None, None, training=True)
        assert (y - exact).abs().max() < 5e-6


def test_the_same_bits_for_any_number_of_threads():
    results = []
    for n in (1, 2, 3):
        with fastbn.threads(n):
            bn = ft.BatchNorm2d(16)
            torch.manual_seed(0)
            x = torch.randn(8, 16, 40, 40).requires_grad_()
            bn(x).square().sum().backward()
            results.append((bn.running_var, x.grad, bn.weight.grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("shape", ((0, 3), (0, 3, 4), (0, 3, 2, 2), (2, 3, 0, 4)), ids=str)
def test_an_empty_batch_changes_nothing(shape):
    fast = PAIRS[len(shape)][1](3)
    x = torch.empty(shape, requires_grad=True)
    y = fast(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(fast.running_mean, torch.zeros(3))
    assert torch.equal(fast.running_var, torch.ones(3))
    assert torch.equal(fast.weight.grad, torch.zeros(3))
    assert fast.num_batches_tracked == 1


def test_attributes_of_other_kinds():
    class Counted(ft.BatchNorm1d):
        """Keeps what PyTorch keeps in other places."""

        @property
        def training(self):
            return True

        @training.setter
        def training(self, value):
            pass

    x = torch.randn(4, 3)
    plain, fast = nn.BatchNorm1d(3), Counted(3)
    close(fast(x), plain(x))
    for module in (plain, fast):
        del module.num_batches_tracked
        module.num_batches_tracked = torch.tensor(4)
        module(x)
    assert plain.num_batches_tracked == fast.num_batches_tracked == 5


@pytest.mark.parametrize("training", (1, 0, np.True_, np.False_), ids=repr)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_training_flag_that_is_no_bool(training, dtype):
    x = batch((4, 3, 5, 6), dtype)[:, :, ::2]  # of strides that take the full way
    plain, fast = nn.BatchNorm2d(3).to(dtype), ft.BatchNorm2d(3).to(dtype)
    plain.training = fast.training = training
    close(fast(x), plain(x))
    close(fast.running_mean, plain.running_mean)
    assert fast.num_batches_tracked == plain.num_batches_tracked == int(training)
