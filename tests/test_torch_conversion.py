"""convert, revert and fuse: which modules they change, what stays, and that results stay."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import fx, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import fastbn.torch as ft  # noqa: E402


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20261121)


class Block(nn.Module):
    """A residual block as ResNet has it."""

    def __init__(self, before, channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or before != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 8), Block(8, 16, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10), nn.BatchNorm1d(10),
    )  # fmt: skip


def kinds(model):
    return [type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def steps(model, n=3, optimizer=None):
    """Train a little; return outputs, losses, and then what inference gives."""
    torch.manual_seed(1)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    results = []
    for _ in range(n):
        x, target = torch.randn(6, 3, 8, 8), torch.randint(0, 10, (6,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(x), target)
        loss.backward()
        optimizer.step()
        results.append(loss.detach())
    with torch.no_grad():
        results.append(model.eval()(torch.randn(6, 3, 8, 8)))
    return results


def same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_convert_and_revert():
    plain = network()
    model = copy.deepcopy(plain)
    before = {id(m): m for m in model.modules()}
    tensors = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert ft.convert(model) is model
    assert kinds(model) == [ft.BatchNorm2d] * 6 + [ft.BatchNorm1d]
    assert {id(m) for m in model.modules()} == set(before)
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == tensors
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules() if "BatchNorm" in str(type(m)))
    same(steps(model), steps(plain))
    assert ft.revert(model) is model
    assert kinds(model) == kinds(plain)
    same(model.state_dict().values(), plain.state_dict().values())
    same(steps(model), steps(plain))


def test_a_state_dictionary_goes_both_ways():
    plain, fast = network(), ft.convert(network())
    fast.load_state_dict(plain.state_dict())
    same(steps(fast), steps(plain))
    plain.load_state_dict(fast.state_dict())
    same([plain(torch.ones(2, 3, 8, 8))], [fast(torch.ones(2, 3, 8, 8))])


def test_an_optimizer_made_before_goes_on():
    plain, model = network(), network()
    model.load_state_dict(plain.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    same(steps(ft.convert(model), optimizer=optimizer), steps(plain))


def test_flags_hooks_and_sharing_stay():
    bn = nn.BatchNorm2d(3, eps=1e-2, momentum=None).eval()
    bn.weight.requires_grad_(False)
    calls = []
    bn.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    model = nn.Sequential(bn, nn.ModuleList([bn]), nn.Sequential(nn.Sequential(nn.BatchNorm3d(2))))
    ft.convert(model)
    assert model[0] is model[1][0] is bn
    assert (bn.training, bn.eps, bn.momentum, bn.weight.requires_grad) == (False, 1e-2, None, False)
    bn(torch.randn(2, 3, 4, 4))
    assert calls == [ft.BatchNorm2d]
    assert type(model[2][0][0]) is ft.BatchNorm3d


def test_a_model_that_is_a_batch_norm():
    bn = nn.BatchNorm1d(3)
    assert type(ft.convert(bn)) is ft.BatchNorm1d
    assert type(ft.convert(bn)) is ft.BatchNorm1d  # again: nothing to do
    assert type(ft.revert(bn)) is nn.BatchNorm1d


def test_what_is_left_alone():
    class Own(nn.BatchNorm2d):
        pass

    modules = [Own(3), nn.LazyBatchNorm2d(), nn.SyncBatchNorm(3), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3)]
    before = [type(m) for m in modules]
    ft.convert(nn.ModuleList(modules))
    assert [type(m) for m in modules] == before
    act = ft.BatchNormReLU2d(3)
    assert type(ft.revert(act)) is ft.BatchNormReLU2d


@pytest.mark.parametrize("function", (ft.convert, ft.revert, ft.fuse, ft.convert_sync_batchnorm))
def test_what_is_no_model(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        function({})


@pytest.mark.parametrize("make", (lambda: ft.convert(network()), lambda: ft.fuse(network())), ids=("convert", "fuse"))
def test_copies_and_pickles(make):
    model = make()
    steps(model, 1)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    x = torch.randn(2, 3, 8, 8)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert kinds(other) == kinds(model)
        assert torch.equal(other.eval()(x), model.eval()(x))
        other.train()(x)
        assert not torch.equal(other.get_buffer("1.running_mean"), model.get_buffer("1.running_mean"))


# --- fuse


def test_fuse_a_residual_network():
    plain = network()
    fused = ft.fuse(copy.deepcopy(plain))
    assert isinstance(fused, fx.GraphModule)
    assert sorted(fused.state_dict()) == sorted(plain.state_dict())
    assert kinds(fused).count(ft.BatchNormAct2d) == 5  # one of the two before the second addition is a plain one
    assert kinds(fused).count(ft.BatchNorm2d) == 1
    assert kinds(fused).count(ft.BatchNorm1d) == 1
    assert not any(isinstance(m, nn.ReLU) for m in fused.modules())
    assert not any(node.op == "call_function" for node in fused.graph.nodes)
    same(steps(fused), steps(plain))
    same((fused.state_dict()[k] for k in plain.state_dict()), plain.state_dict().values())


def test_fuse_leaves_the_model_and_shares_its_tensors():
    model = network()
    before = kinds(model)
    fused = ft.fuse(model)
    assert kinds(model) == before
    assert {id(t) for t in fused.parameters()} == {id(t) for t in model.parameters()}
    assert {id(t) for t in fused.buffers()} == {id(t) for t in model.buffers()}
    fused(torch.randn(2, 3, 8, 8))
    assert model[1].num_batches_tracked == 1


class Pattern(nn.Module):
    def __init__(self, follow):
        super().__init__()
        self.bn, self.other, self.follow = nn.BatchNorm2d(3), nn.BatchNorm2d(3), follow
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x):
        return self.follow(self, x)


def _mutates(m, x):
    y = m.bn(x)
    x.mul_(2)
    return F.relu(y + x)


PATTERNS = {
    "relu method": (lambda m, x: m.bn(x).relu(), "relu"),
    "relu_": (lambda m, x: m.bn(x).relu_(), "relu"),
    "torch.relu": (lambda m, x: torch.relu(m.bn(x)), "relu"),
    "relu6": (lambda m, x: F.relu6(m.bn(x)), "relu6"),
    "silu in place": (lambda m, x: F.silu(m.bn(x), inplace=True), "silu"),
    "module": (lambda m, x: m.act(m.bn(x)), ("leaky_relu", 0.2)),
    "slope": (lambda m, x: F.leaky_relu(m.bn(x), -0.5), ("leaky_relu", -0.5)),
    "gelu": (lambda m, x: F.gelu(m.bn(x), approximate="tanh"), "gelu_tanh"),
    "exact gelu": (lambda m, x: F.gelu(m.bn(x)), None),
    "sum": (lambda m, x: F.relu(x + m.bn(x)), "relu"),
    "torch.add": (lambda m, x: F.relu(torch.add(m.bn(x), x)), "relu"),
    "add method": (lambda m, x: F.relu(x.add(m.bn(x))), "relu"),
    "scaled sum": (lambda m, x: F.relu(torch.add(m.bn(x), x, alpha=2)), None),
    "a number": (lambda m, x: F.relu(m.bn(x) + 1), None),
    "broadcast": (lambda m, x: F.relu(m.bn(x * 2) + x.mean((2, 3), keepdim=True)), "relu"),
    "read between": (lambda m, x: F.relu(m.bn(x) + x.exp()), None),
    "twice": (lambda m, x: F.relu((lambda y: y + y)(m.bn(x))), None),
    "sum alone": (lambda m, x: m.bn(x) + x, None),
    "another reader": (lambda m, x: (lambda y: y.relu() + y)(m.bn(x)), None),
    "called twice": (lambda m, x: m.bn(m.bn(x).relu()).relu(), "relu"),
    "called differently": (lambda m, x: m.bn(m.bn(x).relu()), None),
    "written between": (_mutates, None),
    "two of them": (lambda m, x: F.relu(m.bn(x) + m.other(x * 2)), None),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns(name):
    follow, activation = PATTERNS[name]
    plain = Pattern(follow)
    fused = ft.fuse(copy.deepcopy(plain))
    if name != "two of them":
        assert getattr(fused.bn, "activation", None) == activation
        assert type(fused.bn) is (ft.BatchNorm2d if activation is None else ft.BatchNormAct2d)
    for training in (True, False):
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(
            fused.train(training)(x.clone()), plain.train(training)(x.clone()), rtol=1e-4, atol=1e-5
        )


def test_one_of_two_batch_norms_is_fused():
    fused = ft.fuse(Pattern(PATTERNS["two of them"][0]))
    assert sorted(k.__name__ for k in kinds(fused)) == ["BatchNorm2d", "BatchNormAct2d"]


def test_fuse_after_convert():
    plain = network()
    fused = ft.fuse(ft.convert(copy.deepcopy(plain)))
    assert kinds(fused).count(ft.BatchNormAct2d) == 5
    same(steps(fused), steps(plain))


def test_fuse_says_when_it_cannot_trace():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(fx.proxy.TraceError):
        ft.fuse(Branches())
