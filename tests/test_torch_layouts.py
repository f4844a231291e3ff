"""Tensors of any layout in fastbn.torch: strides as PyTorch's, views, shared memory, and what is written in place."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch_cases import PAIRS, TOLERANCE, batch, close  # noqa: E402

import fastbn.torch as ft  # noqa: E402
from fastbn.torch import bridge  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("torch_seed"),
    # PyTorch uses parts of itself that it deprecates.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


def views():
    x = torch.randn(4, 6, 8, 10)
    yield x[:, ::2, :, 1:7]
    yield x.contiguous(memory_format=torch.channels_last)[:, :, ::2]
    yield x.permute(1, 0, 3, 2)
    yield x[:, :1].expand(4, 6, 8, 10)
    yield torch.randn(5, 7, 6).transpose(1, 2)
    yield torch.randn(6, 9).t()
    yield torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)[..., ::2]


@pytest.mark.parametrize("x", list(views()), ids=lambda x: str(tuple(x.stride())))
def test_any_strides(x):
    """Values, and the strides that PyTorch's own batch norm gives its result."""
    dy = torch.randn(x.shape)
    results = []
    for function in (F.batch_norm, ft.batch_norm):
        source = x.detach().requires_grad_()
        y = function(source, None, None, training=True)
        (dx,) = torch.autograd.grad(y, source, dy)
        results.append((y, dx))
    for wanted, got in zip(*results):
        close(got, wanted)
        assert got.stride() == wanted.stride()


def test_a_gradient_of_another_format():
    x = batch((4, 6, 5, 5), last=True).requires_grad_()
    dy = torch.randn(4, 6, 5, 5)
    wanted = torch.autograd.grad(F.batch_norm(x, None, None, training=True), x, dy)[0]
    for other in (dy, dy.contiguous(memory_format=torch.channels_last), dy[..., :1].expand_as(dy)):
        dx = torch.autograd.grad(ft.batch_norm(x, None, None, training=True), x, other)[0]
        assert dx.is_contiguous(memory_format=torch.channels_last)
        if other.stride()[-1]:
            close(dx, wanted)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_arrays_are_the_tensors_memory(dtype):
    x = torch.zeros(2, 3, 4, dtype=dtype, requires_grad=True)
    array = bridge.array(x)
    assert array.ctypes.data == x.data_ptr()
    assert array.shape == x.shape
    assert array.strides == tuple(s * x.element_size() for s in x.stride())


def test_running_statistics_that_are_views():
    store = torch.ones(6, 2)
    mean, variance = store[:3, 0].zero_(), store[3:, 1]
    x = batch((4, 3, 5))
    plain = torch.zeros(3), torch.ones(3)
    F.batch_norm(x, *plain, training=True)
    ft.batch_norm(x, mean, variance, training=True)
    close(mean, plain[0])
    close(variance, plain[1])


def test_a_changed_input_is_noticed():
    bn = ft.BatchNorm1d(3)
    x = batch((4, 3)).requires_grad_()
    h = x * 2
    y = bn(h)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_result_may_be_overwritten():
    bn = ft.BatchNorm1d(3)
    x = batch((4, 3)).requires_grad_()
    y = F.relu_(bn(x))
    y.sum().backward()
    other = copy.deepcopy(bn)
    z = x.detach().clone().requires_grad_()
    F.relu(other(z)).sum().backward()
    assert torch.equal(x.grad, z.grad)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("where", ("one vector", "one value", "weight", "input"))
def test_running_statistics_that_share_memory(where, dtype):
    """PyTorch computes that, in its own order."""
    results = []
    for function in (F.batch_norm, ft.batch_norm):
        torch.manual_seed(0)
        x, weight, var = torch.randn(4, 3, dtype=dtype), torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype)
        mean = {"one vector": var, "one value": var[:1].clone().expand(3), "weight": weight, "input": x[1]}[where]
        y = function(x, mean, var, weight.requires_grad_(where != "weight"), None, True)
        results.append((y, var, mean))
    for wanted, got in list(zip(*results))[: 2 if where == "one value" else 3]:  # which value is last is up to threads
        assert torch.equal(got, wanted)


def test_running_statistics_that_are_not_aligned():
    x, mean = torch.randn(5, 3, 4).transpose(0, 2), torch.frombuffer(bytearray(13), dtype=torch.float32, offset=1)
    ft.batch_norm(x, mean, torch.ones(3), training=True, momentum=1.0)
    close(mean, x.mean((0, 2)))


def negated(tensor):
    """The same values, as a view that negates those in memory."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    return view


def test_views_that_negate():
    plain, fast = nn.BatchNorm1d(3), ft.BatchNorm1d(3)
    x, dy = torch.randn(2, 4, 3, 8)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain(a).backward(negated(dy))
    fast(b).backward(negated(dy))
    close(b.grad, a.grad)
    weight = torch.randn(3)
    for zero in (torch.zeros(4, 3, 8), torch._efficientzerotensor((4, 3, 8))):
        y = ft.batch_norm(zero, None, None, negated(weight), weight, True)
        close(y, F.batch_norm(torch.zeros(4, 3, 8), None, None, weight, weight, True))
    mean, variance = negated(torch.randn(3)), torch.ones(3)
    close(ft.batch_norm(x, mean, variance), F.batch_norm(x, mean, variance))
    fast.zero_grad()
    b.grad = None
    fast(b).backward(torch._efficientzerotensor((4, 3, 8)))
    assert not b.grad.any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "strides",
    (((1, 3, 8, 9), (3, 1, 27, 3)), ((1, 3, 2, 8, 9), (3, 1, 216, 27, 3)), ((2, 1, 4, 4), (16, 7, 4, 1))),
    ids=str,
)
def test_strides_of_axes_of_one_index(strides, dtype):
    """One image that was read as (H, W, C) is channels_last to PyTorch."""
    x = torch.randn(1000).to(dtype).as_strided(*strides)
    plain, fast = (kind(x.shape[1], dtype=dtype) for kind in PAIRS[x.dim()])
    for training in (True, False):
        wanted, got = plain.train(training)(x), fast.train(training)(x)
        assert got.stride() == wanted.stride()
        close(got, wanted)
