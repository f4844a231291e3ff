"""PyTorch's transforms take fastbn.torch: torch.func, tangents and batches of gradients, checkpoints, autocast."""

from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch_cases import ACTIVATIONS, batch, close  # noqa: E402

import fastbn.torch as ft  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("torch_seed"),
    # PyTorch uses parts of itself that it deprecates.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


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


COMPILED = """
import sys, torch, fastbn.torch
torch.manual_seed(0)
x, tangent = torch.randn(5, 3), torch.randn(5, 3)
bn = {"ours": fastbn.torch, "theirs": torch.nn}[sys.argv[1]].BatchNorm1d(3, track_running_stats=False)
for name, transformed in {
    "grad": torch.func.grad(lambda x: bn(x).pow(3).sum()),
    "jacrev": torch.func.jacrev(lambda x: bn(x)),
    "vmap": lambda x: torch.vmap(lambda z: bn(z))(torch.stack((x, x))),
    "jvp": lambda x: torch.func.jvp(bn, (x,), (tangent,))[1],
}.items():
    expected = transformed(x)
    try:
        result = torch.compile(transformed, backend="aot_eager", fullgraph=True)(x)
        print(name, torch.allclose(result, expected, atol=1e-5))
    except RuntimeError as error:
        print(name, type(error).__name__)
"""


@pytest.mark.slow
def test_compiled_transforms():
    """Gradients failed, and tangents were 0. PyTorch 2.13 compiles jvp for none.

    Models that PyTorch compiles after transforms lose their gradients, its own too: hence processes.
    """
    command = [sys.executable, "-c", COMPILED]
    told = {
        who: subprocess.run([*command, who], capture_output=True, text=True, timeout=300, check=False).stdout
        for who in ("ours", "theirs")
    }
    assert told["ours"] == told["theirs"]
    assert told["ours"].splitlines()[:3] == ["grad True", "jacrev True", "vmap True"]
    assert len(told["ours"].splitlines()) == 4


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
