"""convert, revert and fuse: which modules they change, what stays, and that results stay."""

from __future__ import annotations

import copy
import io
import pickle
from operator import imul, setitem

import pytest

torch = pytest.importorskip("torch")

from torch import fx, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import fastbn.torch as ft  # noqa: E402

fx.wrap("imul")
fx.wrap("setitem")


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
        self.act, self.relu = nn.LeakyReLU(0.2), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.follow(self, x)


def _mutates(m, x):
    y = m.bn(x)
    x.mul_(2)
    return F.relu(y + x)


def _adds(m, x):
    y = m.bn(x)
    y += x
    return F.relu(y)


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
    "read between": (lambda m, x: F.relu(m.bn(x) + x.exp()), "relu"),
    "add_": (lambda m, x: F.relu(m.bn(x).add_(x)), None),
    "+=": (_adds, "relu"),
    "inplace module": (lambda m, x: m.relu(m.bn(x) + x), "relu"),
    "keyword": (lambda m, x: F.relu(m.bn(input=x) + x), "relu"),
    "a size": (lambda m, x: F.relu(m.bn(x) + x.size(0)), "relu"),
    "torch.add of a size": (lambda m, x: F.silu(torch.add(m.bn(x), x.shape[1])), "silu"),
    "a size before": (lambda m, x: F.silu(x.size(0) + m.bn(x)), "silu"),
    "both terms": (lambda m, x: F.relu(m.bn(x) + m.bn(x * 2)), None),
    "twice": (lambda m, x: F.relu((lambda y: y + y)(m.bn(x))), None),
    "sum alone": (lambda m, x: m.bn(x) + x, None),
    "another reader": (lambda m, x: (lambda y: y.relu() + y)(m.bn(x)), None),
    "called twice": (lambda m, x: m.bn(m.bn(x).relu()).relu(), "relu"),
    "called in a row": (lambda m, x: (lambda y: F.relu(m.bn(y) + y))(F.relu(m.bn(x) + x)), "relu"),
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


@pytest.mark.parametrize("make", (ft.BatchNorm2d, ft.BatchNormReLU2d, nn.BatchNorm2d))
@pytest.mark.parametrize("trace", (ft.fuse, fx.symbolic_trace))
def test_a_batch_norm_itself_cannot_be_traced(make, trace):
    with pytest.raises(fx.proxy.TraceError):
        trace(make(3))


def test_what_a_model_does_not_use_stays_in_the_state_dictionary():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
            self.block.register_buffer("count", torch.ones(2))
            self.aux = nn.ModuleDict({"head": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))})
            self.scale = nn.Parameter(torch.ones(1))
            self.again = self.block
            self.register_buffer("index", torch.ones(2), persistent=False)

        def forward(self, x):
            return self.block(x)

    plain = Model()
    fused = ft.fuse(plain)
    assert kinds(fused) == [ft.BatchNormAct2d]
    assert {id(p) for p in fused.parameters()} == {id(p) for p in plain.parameters()}
    for model in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), ft.fuse(fused)):
        assert sorted(model.state_dict()) == sorted(plain.state_dict())
        same([model.state_dict()[k] for k in plain.state_dict()], plain.state_dict().values())
        model.load_state_dict(plain.state_dict())


def test_names_that_a_graph_module_needs_itself():
    plain = Pattern(PATTERNS["relu method"][0])
    plain.register_buffer("code", torch.ones(2))
    plain.graph = nn.Linear(2, 2)
    fused = ft.fuse(plain)
    assert "def forward" in fused.code
    assert sorted(fused.state_dict()) == [k for k in sorted(plain.state_dict()) if not k.startswith(("code", "graph"))]


def test_fuse_says_when_it_cannot_trace():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(fx.proxy.TraceError):
        ft.fuse(Branches())
