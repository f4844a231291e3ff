"""Errors of fastbn.torch are PyTorch's, word for word, and what fastbn does not take goes to PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch_cases import batch  # noqa: E402

import fastbn.torch as ft  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("torch_seed"),
    # PyTorch uses parts of itself that it deprecates.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


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
