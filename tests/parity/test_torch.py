"""PyTorch: layers built from its modules train, infer and differentiate as they do, and states go both ways.

PyTorch's CPU build normalizes through its own kernels and oneDNN's: what holds here holds for oneDNN too.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parity import frameworks
from parity.configurations import configurations
from parity.tolerances import Moving, Step, assert_within

from fastbn.compat import from_torch, from_torch_many, to_torch, torch_arguments

torch = frameworks.load("torch", "pip install torch==2.13.0")

KINDS = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def tensor(a, last=False):
    t = torch.from_numpy(a.copy())
    return t.contiguous(memory_format=CHANNELS_LAST[a.ndim]) if last else t


@frameworks.configurations
@given(
    configuration=configurations(axes="second"),
    affine=st.booleans(),
    bias=st.booleans(),
    track=st.sampled_from((True, True, False)),
    average=st.booleans(),
    dtype=st.sampled_from((np.float32, np.float32, np.float64)),
    last=st.booleans(),
)
def test_layer(configuration, affine, bias, track, average, dtype, last):
    c = configuration
    last = last and len(c.shape) in CHANNELS_LAST
    momentum = None if average else 1 - c.momentum
    module = KINDS[len(c.shape)](
        c.channels[0], c.epsilon, momentum, affine, track, dtype=getattr(torch, np.dtype(dtype).name), bias=bias
    )
    gamma, beta, mean, variance = c.parameters(dtype)
    with torch.no_grad():
        for name, value in {"weight": gamma, "bias": beta, "running_mean": mean, "running_var": variance}.items():
            if getattr(module, name) is not None:
                getattr(module, name).copy_(torch.from_numpy(value))
    gamma, beta = (None if p is None else p.detach().numpy() for p in (module.weight, module.bias))
    ours = from_torch(module)
    moving = Moving(mean, variance)

    def compare(training, step, x, dy):
        xt = tensor(x, last).requires_grad_()
        module.zero_grad()
        yt = module.train(training)(xt)
        yt.backward(tensor(dy, last))
        strided = tensor(x, last).numpy()
        assert_within(ours(strided, training), yt.detach().numpy(), step.e_y, "y")
        dx, dgamma, dbeta = step.gradients(dy)
        assert_within(ours.backward(dy), xt.grad.numpy(), dx, "dx")
        assert set(ours.grads) == {n for n, p in (("gamma", module.weight), ("beta", module.bias)) if p is not None}
        if gamma is not None:
            assert_within(ours.grads["gamma"], module.weight.grad.numpy(), dgamma, "dgamma")
        if beta is not None:
            assert_within(ours.grads["beta"], module.bias.grad.numpy(), dbeta, "dbeta")

    for number in range(1, c.steps + 1):
        x, dy = c.batch(dtype), c.gradient(dtype)
        step = Step(x, 1, c.epsilon, gamma, beta, folded=True)
        compare(True, step, x, dy)
        moving.update(step, 1 - 1 / number if average else c.momentum, ddof=1)
        if track:
            assert_within(ours.moving_mean, module.running_mean.numpy(), moving.bounds[0], "running_mean")
            assert_within(ours.moving_variance, module.running_var.numpy(), moving.bounds[1], "running_var")
            assert ours.batches == module.num_batches_tracked

    # From here on both have the same numbers.
    if module.state_dict():
        ours = from_torch({k: v.numpy() for k, v in module.state_dict().items()}, eps=c.epsilon, momentum=momentum)
    back = to_torch(ours)
    assert set(back) == set(module.state_dict())
    for name, value in module.state_dict().items():
        np.testing.assert_array_equal(back[name], value.numpy())
        assert back[name].dtype == value.numpy().dtype
    x, dy = c.batch(dtype), c.gradient(dtype)
    given_ = (module.running_mean.numpy(), module.running_var.numpy()) if track else None
    compare(False, Step(x, 1, c.epsilon, gamma, beta, given=given_, folded=True), x, dy)

    other = type(module)(**torch_arguments(ours), dtype=getattr(torch, np.dtype(dtype).name))
    to_torch(ours, other)
    assert (other.eps, other.momentum) == (module.eps, momentum if average else torch_arguments(ours)["momentum"])
    assert average or abs(other.momentum - momentum) < 1e-15
    for name, value in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    frameworks.agreed(f"torch {torch.__version__}: nn.BatchNorm")


def test_model_with_many_layers():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Sequential(torch.nn.BatchNorm2d(4, eps=0.1)),
        torch.nn.InstanceNorm2d(4, track_running_stats=True),
    )  # fmt: skip
    layers = from_torch_many(model)
    assert {name: bn.epsilon for name, bn in layers.items()} == {"1": 1e-5, "2.0": 0.1}
    assert list(from_torch_many(model, "2")) == ["2.0"]
    assert from_torch(model, "2.0").epsilon == 0.1


def test_half_precision_weights_and_devices():
    module = torch.nn.BatchNorm1d(3, dtype=torch.bfloat16)
    assert from_torch(module).gamma.dtype == np.float32
    assert from_torch(module.half()).moving_mean.dtype == np.float32


BN = torch.nn.BatchNorm1d


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: from_torch(torch.nn.Sequential(BN(3))),
            TypeError,
            "source must be a batch norm module, or name one by prefix, or go to from_torch_many, "
            "got Sequential with these: 0",
        ),
        (
            lambda: from_torch(torch.nn.Sequential(BN(3)), "1"),
            ValueError,
            "prefix must name a batch norm of the model: 0, got '1'",
        ),
        (
            lambda: from_torch(torch.nn.LazyBatchNorm1d()),
            ValueError,
            "source must have its parameters, got LazyBatchNorm1d before its first batch",
        ),
        (
            lambda: to_torch(from_torch(BN(3)), BN(4)),
            ValueError,
            "weight of module must have shape (3,), got (4,)",
        ),
        (
            lambda: to_torch(from_torch(BN(3)), BN(3, affine=False)),
            ValueError,
            "module must have bias, num_batches_tracked, running_mean, running_var, weight, "
            "got num_batches_tracked, running_mean, running_var",
        ),
        (
            lambda: to_torch(from_torch(BN(3)), torch.nn.Linear(3, 3)),
            TypeError,
            "module must be a batch norm module, got Linear",
        ),
        (
            lambda: to_torch(from_torch(BN(3)), BN(3), prefix="a"),
            ValueError,
            "prefix must not be given with a module, got 'a'",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
