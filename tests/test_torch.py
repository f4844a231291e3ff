"""fastbn.torch computes what PyTorch's batch norm computes, and keeps its flags, layouts and errors.

PyTorch's own modules are the reference for behaviour; for values that is PyTorch in float64.
"""

from __future__ import annotations

import copy
import itertools
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import fastbn  # noqa: E402
import fastbn.torch as ft  # noqa: E402
from fastbn.compat import from_torch_many  # noqa: E402
from fastbn.torch import bridge  # noqa: E402

PAIRS = {
    2: (nn.BatchNorm1d, ft.BatchNorm1d),
    3: (nn.BatchNorm1d, ft.BatchNorm1d),
    4: (nn.BatchNorm2d, ft.BatchNorm2d),
    5: (nn.BatchNorm3d, ft.BatchNorm3d),
}
SHAPES = [(4, 3), (7, 5, 9), (4, 8, 10, 10), (4, 1, 9, 9), (4, 9, 1, 1), (2, 40, 7, 7), (3, 4, 2, 5, 6)]
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Units in the last place of values around 1: half a unit for one rounding, a few for sums in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    ("leaky_relu", -0.3): lambda z: F.leaky_relu(z, -0.3),
}


# PyTorch uses parts of itself that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(int(os.environ.get("FASTBN_TEST_SEED", "20261121")))


def close(got, wanted, dtype=None):
    dtype = dtype or got.dtype
    scale = max(1.0, wanted.detach().double().abs().max().item()) if wanted.numel() else 1.0
    torch.testing.assert_close(
        got.detach().double(), wanted.detach().double(), rtol=0, atol=TOLERANCE[dtype] * scale, equal_nan=True
    )


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


def batch(shape, dtype=torch.float32, last=False):
    x = torch.randn(shape, dtype=torch.float64).mul(2).add(1).to(dtype)
    return x.contiguous(memory_format=FORMATS[len(shape)]) if last else x


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


# --- values


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


# --- layouts


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


# --- activation and residual


@pytest.mark.parametrize("activation", (None, *ACTIVATIONS), ids=str)
@pytest.mark.parametrize("added", (False, True), ids=("alone", "residual"))
@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
def test_fused(activation, added, last):
    x, residual = batch((4, 6, 5, 5), last=last), batch((4, 6, 5, 5), last=last)
    for training in (True, False):
        results = []
        for fused in (False, True):
            tensors = [t.clone().requires_grad_() for t in (x, residual, torch.ones(6) * 1.2, torch.ones(6) * 0.1)]
            statistics = torch.zeros(6), torch.ones(6)
            arguments = (tensors[0], *statistics, tensors[2], tensors[3], training)
            if fused:
                y = ft.batch_norm(*arguments, activation=activation, residual=tensors[1] if added else None)
            else:
                y = F.batch_norm(*arguments)
                if added:
                    y = y + tensors[1]
                if activation:
                    y = ACTIVATIONS[activation](y)
            y.square().sum().backward()
            results.append((y, *(t.grad for t in tensors if t.grad is not None), *statistics))
        assert len(results[0]) == len(results[1])
        for wanted, got in zip(*results):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ((1, 6, 5, 5), (6, 1, 1)), ids=str)
def test_a_residual_that_broadcasts(shape):
    x, residual = batch((4, 6, 5, 5)), torch.randn(shape, requires_grad=True)
    y = ft.BatchNormReLU2d(6)(x, residual)
    close(y, F.relu(F.batch_norm(x, None, None, training=True) + residual))
    y.sum().backward()
    assert residual.grad.shape == shape


def test_modules_with_an_activation():
    bn = ft.BatchNormAct2d(4, activation="silu", momentum=0.2)
    assert bn.activation == "silu"
    assert "activation='silu'" in repr(bn)
    assert bn.momentum == 0.2
    assert list(bn.state_dict()) == list(nn.BatchNorm2d(4).state_dict())
    assert ft.BatchNormReLU1d(4).activation == "relu"
    assert ft.BatchNormReLU3d(4, activation="relu6").activation == "relu6"
    for kind in (ft.BatchNormAct1d, ft.BatchNormReLU1d):
        assert issubclass(kind, nn.BatchNorm1d)
        assert issubclass(kind, ft.BatchNorm1d)
    with pytest.raises(ValueError, match="activation must be None, relu, "):
        ft.BatchNormAct2d(4, activation="tanh")
    with pytest.raises(ValueError, match="activation must be None, relu, "):
        ft.batch_norm(batch((4, 3)), None, None, training=True, activation="tanh")


def test_a_module_with_an_activation_as_a_layer():
    model = nn.Sequential(ft.BatchNormAct2d(4, activation=("leaky_relu", -0.3)), ft.BatchNorm2d(4))
    model(batch((3, 4, 5, 5)))
    x = batch((3, 4, 5, 5))
    for module, layer in zip(model.eval(), from_torch_many(model).values(), strict=True):
        close(torch.from_numpy(layer(x.numpy())), module(x))


# --- what goes to PyTorch, and errors


@pytest.mark.parametrize(
    "shape, number", [((3,), 1), ((2, 3, 4, 5), 1), ((2, 3), 2), ((2, 3, 4), 2), ((2, 3, 4, 5), 3), ((1, 3), 1)]
)
def test_errors_of_modules_are_pytorchs(shape, number):
    x = torch.zeros(shape)
    plain, fast = (getattr(package, f"BatchNorm{number}d")(3) for package in (nn, ft))
    with pytest.raises(ValueError) as wanted:
        plain(x)
    with pytest.raises(ValueError) as got:
        fast(x)
    assert str(got.value) == str(wanted.value)


@pytest.mark.parametrize(
    "change",
    [
        {"running_mean": torch.zeros(2)},
        {"running_var": None},
        {"running_mean": None, "running_var": None, "training": False},
        {"weight": torch.zeros(4)},
        {"weight": torch.zeros(3).double()},
        {"bias": torch.zeros(1, 3)},
        {"eps": 0.0},
        {"eps": -1.0},
        {"input": torch.zeros(4, 3, dtype=torch.int64)},
        {"input": torch.zeros(4, 3, dtype=torch.complex64)},
        {"input": torch.zeros(1, 3)},
        {"input": torch.zeros(4)},
        {"input": None},
        {"input": [[1.0, 2.0, 3.0]], "training": False},
        {"training": 1},
        {"running_mean": [0.0, 0.0, 0.0]},
        {"weight": np.ones(3, np.float32)},
        {"weight": torch.ones(3).to_sparse()},
        {"bias": 1.0},
        {"momentum": None},
        {"momentum": torch.tensor([0.1])},
        {"eps": "1e-5"},
        {"eps": True},
        {"eps": np.inf},
    ],
    ids=str,
)
def test_errors_of_the_function_are_pytorchs(change):
    arguments = {
        "input": torch.zeros(4, 3), "running_mean": torch.zeros(3), "running_var": torch.ones(3),
        "weight": torch.ones(3), "bias": torch.zeros(3), "training": True, **change,
    }  # fmt: skip
    outcomes = []
    for function in (F.batch_norm, ft.batch_norm):
        try:
            outcomes.append(function(**arguments).shape)
        except Exception as error:
            outcomes.append((type(error), str(error)))
    assert outcomes[0] == outcomes[1]


def test_what_fastbn_does_not_take_goes_to_pytorch():
    x = batch((4, 3, 5, 5))
    mean, variance = torch.zeros(3), torch.ones(3)
    ft.batch_norm(x, mean, variance, training=True, momentum=-1.2)  # extrapolates: PyTorch allows it
    plain = torch.zeros(3), torch.ones(3)
    F.batch_norm(x, *plain, training=True, momentum=-1.2)
    assert torch.equal(mean, plain[0])
    assert torch.equal(variance, plain[1])
    meta = ft.BatchNorm2d(3, device="meta")
    assert meta(x.to("meta")).shape == x.shape
    assert ft.BatchNormReLU2d(3, device="meta")(x.to("meta"), x.to("meta")).is_meta

    class Subclass(torch.Tensor):
        pass

    assert type(ft.BatchNorm2d(3)(x.as_subclass(Subclass))) is Subclass


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


@pytest.mark.parametrize("other", (2, 0.5, torch.ones(4, 3).double()), ids=str)
def test_a_residual_of_another_kind(other):
    x, mean, var = batch((4, 3)), torch.zeros(3), torch.ones(3)
    y = ft.batch_norm(x, mean, var, activation="relu", residual=other)
    torch.testing.assert_close(y, F.relu(F.batch_norm(x, mean, var) + other))


def test_transforms_of_torch_func():
    bn = ft.BatchNorm1d(3).eval()
    x = batch((5, 3))
    assert torch.equal(torch.func.vmap(lambda row: bn(row[None])[0])(x), nn.BatchNorm1d(3).eval()(x))
    wanted = torch.autograd.functional.jacobian(bn, x)
    close(torch.func.jacrev(bn)(x), wanted)
    close(torch.func.jacfwd(bn)(x), wanted)
    _, tangent = torch.func.jvp(ft.BatchNorm1d(3, track_running_stats=False), (x,), (torch.ones_like(x),))
    close(tangent, torch.zeros_like(x))
    dx = torch.func.grad(lambda z: bn(z).square().sum())(x)
    assert dx.shape == x.shape
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(bn(dual)).tangent is not None


@pytest.mark.parametrize("way", ("functional", "legacy", "escaped"))
def test_tensors_that_wrap_others(way):
    """They look like plain ones, but have no memory of their own."""
    x, escaped = torch.randn(4, 3, 5), []
    results = []
    for function in (F.batch_norm, ft.batch_norm):
        mean, var = torch.zeros(3), torch.ones(3)
        if way == "functional":
            wrapped = [torch._to_functional_tensor(t) for t in (x, mean, var)]
            y = torch._from_functional_tensor(function(*wrapped, training=True))
            mean, var = map(torch._from_functional_tensor, wrapped[1:])
        elif way == "legacy":
            y = torch._vmap_internals._vmap(lambda x: function(x, mean, var))(x[None])  # noqa: B023
        else:
            torch.func.grad(lambda x: (escaped.append(x), x.sum())[1])(x)
            y = function(escaped[-1], mean, var, training=True)
        results.append((y, mean, var))
    for wanted, got in zip(*results):
        close(got, wanted)


def test_running_statistics_that_are_not_aligned():
    x, mean = torch.randn(5, 3, 4).transpose(0, 2), torch.frombuffer(bytearray(13), dtype=torch.float32, offset=1)
    ft.batch_norm(x, mean, torch.ones(3), training=True, momentum=1.0)
    close(mean, x.mean((0, 2)))


def test_checkpoint_autocast_and_inference_mode():
    from torch.utils.checkpoint import checkpoint

    bn, x = ft.BatchNorm2d(3), batch((4, 3, 5, 5)).requires_grad_()
    checkpoint(bn, x, use_reentrant=False).square().sum().backward()
    assert x.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        y = nn.Sequential(nn.Conv2d(3, 3, 1), bn)(x)
    assert y.dtype == torch.bfloat16
    with torch.inference_mode():
        assert bn(x).is_inference()
        assert ft.BatchNorm2d(3)(torch.randn(2, 3, 4, 4)).is_inference()


# -- what comes to a gradient ------------------------------------------------------------------------------------------


def stepwise(x, weight, bias, residual, activation):
    """A training call in PyTorch's own steps."""
    z = F.batch_norm(x, None, None, weight, bias, True)
    z = z if residual is None else z + residual
    if activation == "silu":  # whose gradient takes no tangent in PyTorch
        return z * torch.sigmoid(z)
    return z if activation is None else ACTIVATIONS[activation](z)


def together(x, weight, bias, residual, activation):
    return ft.batch_norm(x, None, None, weight, bias, True, activation=activation, residual=residual)


def operands(added):
    x, residual = (torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return [x, weight, bias, *([residual] if added else [])]


def call(how, operands, activation):
    return how(*operands[:3], operands[3] if len(operands) > 3 else None, activation)


@pytest.mark.parametrize("activation", (None, *ACTIVATIONS), ids=str)
@pytest.mark.parametrize("added", (False, True), ids=("alone", "residual"))
def test_a_tangent_of_the_incoming_gradient(activation, added):
    given = operands(added)
    dy, tangent = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    found = []
    for how in (stepwise, together):
        y = call(how, given, activation)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(dy, tangent)
            grads = torch.autograd.grad(y, given, dual)
            found.append([part for grad in grads for part in torch.autograd.forward_ad.unpack_dual(grad)])
    for wanted, got in zip(*found, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("activation", (None, *ACTIVATIONS), ids=str)
@pytest.mark.parametrize("added", (False, True), ids=("alone", "residual"))
@pytest.mark.parametrize("create_graph", (False, True))
def test_batched_gradients(activation, added, create_graph):
    given = operands(added)
    dys = torch.randn(6, 5, 3, 4, dtype=torch.float64)
    found = []
    for how in (stepwise, together):
        y = call(how, given, activation)
        grads = torch.autograd.grad(y, given, dys, is_grads_batched=True, create_graph=create_graph)
        if create_graph:
            total = sum((grad**2).sum() for grad in grads)
            grads = (*grads, *torch.autograd.grad(total, given[:2]))
        found.append(grads)
    for wanted, got in zip(*found, strict=True):
        close(got, wanted)


def test_batched_gradients_with_given_statistics():
    given = operands(False)
    mean, variance = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    dys = torch.randn(6, 5, 3, 4, dtype=torch.float64)
    found = []
    for batch_norm in (F.batch_norm, ft.batch_norm):
        y = batch_norm(given[0], mean, variance, *given[1:])
        found.append(torch.autograd.grad(y, given, dys, is_grads_batched=True))
    for wanted, got in zip(*found, strict=True):
        close(got, wanted)


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
def test_running_statistics_that_require_a_gradient(dtype):
    x = torch.randn(4, 3, 5, 5, dtype=dtype)
    plain, fast = nn.BatchNorm2d(3, dtype=dtype), ft.BatchNorm2d(3, dtype=dtype)
    for module in (plain, fast):
        module.eval()
        module.running_mean.requires_grad_()
        with torch.no_grad():
            module(x)
    with pytest.raises(RuntimeError, match="not differentiable") as wanted:
        plain(x)
    with pytest.raises(RuntimeError, match="not differentiable") as got:
        fast(x)
    assert str(got.value) == str(wanted.value)


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
