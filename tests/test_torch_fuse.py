"""fuse: which steps of a model become one module, what it shares with the model, and that results stay."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import fx, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch_networks import kinds, network, same, steps  # noqa: E402

import fastbn.torch as ft  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_seed")


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
