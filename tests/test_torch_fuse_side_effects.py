"""fuse keeps side effects: hooks run, statistics are updated in order, tensors written in place are read as before."""

from __future__ import annotations

import copy
from operator import imul, setitem

import pytest

torch = pytest.importorskip("torch")

from torch import fx, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch_networks import same  # noqa: E402

import fastbn.torch as ft  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_seed")

fx.wrap("imul")
fx.wrap("setitem")


def fused_like(plain, activation, *inputs):
    """Fuse a model, and compare two steps of training and one of inference; return what it became."""
    fused = ft.fuse(copy.deepcopy(plain))
    assert getattr(fused.bn, "activation", None) == activation
    results = []
    for model in (plain, fused):
        results.append([])
        for training in (True, True, False):
            given = [value.clone().requires_grad_() for value in inputs]
            # Models may write their inputs, which leaves may not be.
            result = model.train(training)(*(value * 1 for value in given))
            (result * torch.arange(result.shape[-1])).sum().backward()
            results[-1] += [result.detach(), *(value.grad for value in given)]
        results[-1] += [p.grad for _, p in sorted(model.named_parameters())]
        results[-1] += [b.clone() for b in model.bn.buffers()]
    same(*results)
    return fused


def two_inputs():
    return torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)


class Follow(nn.Module):
    """A batch norm, an activation, and a forward pass from outside."""

    def __init__(self, follow, act=None):
        super().__init__()
        self.follow, self.bn, self.act = follow, nn.BatchNorm2d(3), act or nn.ReLU()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, a, b):
        return self.follow(self, a, b)


def _doubled(module, args, output):
    return output * 2


def _tripled(module, gradient, *rest):
    return tuple(None if g is None else g * 3 for g in gradient)


HOOKS = {
    "forward": lambda module: module.register_forward_hook(_doubled),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda module, args: (args[0] - 1,)),
    "with keywords": lambda module: module.register_forward_hook(lambda m, a, k, out: out * 2, with_kwargs=True),
    "backward": lambda module: module.register_full_backward_hook(_tripled),
    "backward pre": lambda module: module.register_full_backward_pre_hook(_tripled),
    "own forward": lambda module: setattr(module, "forward", lambda x: x * 2),
}


@pytest.mark.parametrize("which", ("act", "bn"))
@pytest.mark.parametrize("kind", HOOKS)
def test_modules_with_hooks_are_not_fused(which, kind):
    plain = Follow(lambda m, a, b: m.act(m.bn(a) + b))
    HOOKS[kind](getattr(plain, which))
    fused = fused_like(plain, None, *two_inputs())
    assert type(fused.bn) is ft.BatchNorm2d


def test_hooks_after_convert_run_once():
    model = ft.convert(Follow(lambda m, a, b: m.act(m.bn(a))))
    model.bn.register_forward_hook(_doubled)
    fused_like(model, None, *two_inputs())


def _calls_between(m, a, b):
    y = m.bn(a)
    other = F.relu(m.bn(b * 2) + b)
    return F.relu(y + other)


def _calls_shared(m, a, b):
    y = m.bn(a)
    return F.relu(y + m.other(b))


def _reads_statistics(m, a, b):
    y = m.bn(a)
    shifted = b + m.bn.running_mean.view(1, -1, 1, 1)
    return F.relu(y + b) + shifted


def _writes_bias(m, a, b):
    z = F.silu(m.bn(a))
    m.bn.bias.detach().mul_(b.size(0))
    return z


@pytest.mark.parametrize("follow", (_calls_between, _calls_shared, _reads_statistics))
def test_statistics_are_updated_in_the_same_order(follow):
    plain = Follow(follow)
    plain.other = nn.BatchNorm2d(3, momentum=0.3)
    plain.other.running_mean = plain.bn.running_mean
    fused_like(plain, None, *two_inputs())


def test_parameters_that_the_model_also_reads():
    plain = Follow(_writes_bias)
    nn.init.ones_(plain.bn.bias)
    fused = ft.fuse(plain)
    assert type(fused.bn) is ft.BatchNorm2d
    fused(*two_inputs()).sum().backward()
    assert torch.equal(plain.bn.bias, torch.full((3,), 4.0))


def _writes_later(m, a, b):
    z = F.silu(m.bn(a) + b)
    b.mul_(2.0)
    return z + b


def _writes_result(m, a, b):
    z = F.leaky_relu(m.bn(a) + b)
    z.mul_(2.0)
    return z


def _writes_before_activation(m, a, b):
    z = m.bn(a) + b
    b.mul_(2.0)
    return F.silu(z)


WRITES = {
    "the other term": _writes_later,
    "the other term, before the activation": _writes_before_activation,
    "the result": _writes_result,
    "a view of the result": lambda m, a, b: (lambda z: (z.view(-1).mul_(2.0), z)[1])(F.leaky_relu(m.bn(a) + b)),
    "a view of the other term": lambda m, a, b: (lambda z: (b[0].zero_(), z)[1])(F.silu(m.bn(a) + b)),
    "by a function": lambda m, a, b: F.hardtanh(F.leaky_relu(m.bn(a) + b), -1.0, 1.0, True),
    "by a function's name": lambda m, a, b: torch.exp_(F.leaky_relu(m.bn(a) + b)),
    "by an operator": lambda m, a, b: imul(F.leaky_relu(m.bn(a) + b), 2.0),
    "by a module": lambda m, a, b: m.act(F.leaky_relu(m.bn(a) + b)),
    "an item": lambda m, a, b: (lambda z: (setitem(z, 0, 1.0), z)[1])(F.leaky_relu(m.bn(a) + b)),
    "maybe the other term": lambda m, a, b: (lambda z: (a.neg_(), z)[1])(F.silu(m.bn(a * 2) + b)),
}


@pytest.mark.parametrize("name", WRITES)
def test_tensors_written_in_place(name):
    fused_like(Follow(WRITES[name], nn.Hardtanh(inplace=True)), None, *two_inputs())


def _writes_view(m, a, b):
    h = a * 1
    view = h[:, :, 1:]
    y = m.bn(h)
    view.add_(b[:, :, 1:])
    return F.relu(y + b)


def _writes_base(m, a, b):
    h = a * 1
    y = m.bn(h.view(4, 3, 25))
    F.relu(h, inplace=True)
    return F.relu(y + b.view(4, 3, 25))


@pytest.mark.parametrize("follow", (_writes_view, _writes_base))
def test_inputs_written_in_place(follow):
    plain = Follow(follow)
    if follow is _writes_base:
        plain.bn = nn.BatchNorm1d(3)
    fused = ft.fuse(copy.deepcopy(plain))
    a, b = two_inputs()
    with torch.no_grad():  # PyTorch has no gradient there
        same([fused(a, b)], [plain(a, b)])


def test_tensors_written_as_out():
    plain = Follow(lambda m, a, b: (lambda z: (torch.mul(a, 2.0, out=z), z)[1])(F.relu(m.bn(a) + b)))
    fused = ft.fuse(plain)
    assert type(fused.bn) is ft.BatchNorm2d
    a, b = two_inputs()
    with torch.no_grad():
        same([fused(a, b)], [2 * a])


UNRELATED = {
    "between": lambda m, a, b: F.relu(m.bn(m.conv(a)) + F.relu(m.conv(b), inplace=True)),
    "of a fresh tensor": lambda m, a, b: m.act(m.conv(F.silu(m.bn(a) + b))),
    "a result in place": lambda m, a, b: F.relu_(m.conv(m.act(torch.add(m.bn(a), b)))),
    "of a sum": lambda m, a, b: m.act(m.conv(a) + F.relu(m.bn(m.conv(a)) + b)),
    "of parts put together": lambda m, a, b: F.relu_(torch.cat([F.relu(m.bn(m.conv(a)) + b), b])),
}


@pytest.mark.parametrize("name", UNRELATED)
def test_other_tensors_may_be_written(name):
    activation = "silu" if "silu" in name or name == "of a fresh tensor" else "relu"
    fused_like(Follow(UNRELATED[name], nn.ReLU(inplace=True)), activation, *two_inputs())


@fx.wrap
def _unknown(value):
    return value.mul_(2.0)


def test_functions_that_fuse_does_not_know_may_write():
    fused_like(Follow(lambda m, a, b: _unknown(F.leaky_relu(m.bn(a) + b))), None, *two_inputs())
