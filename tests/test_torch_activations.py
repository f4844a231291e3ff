"""Activations and residuals in the same pass as fastbn.torch's batch norm give what PyTorch's own steps give."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch_cases import ACTIVATIONS, batch, close  # noqa: E402

import fastbn.torch as ft  # noqa: E402
from fastbn.compat import from_torch_many  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("torch_seed"),
    # PyTorch uses parts of itself that it deprecates.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


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


@pytest.mark.parametrize("other", (2, 0.5, torch.ones(4, 3).double()), ids=str)
def test_a_residual_of_another_kind(other):
    x, mean, var = batch((4, 3)), torch.zeros(3), torch.ones(3)
    y = ft.batch_norm(x, mean, var, activation="relu", residual=other)
    torch.testing.assert_close(y, F.relu(F.batch_norm(x, mean, var) + other))
