"""The operators of fastbn.torch: registered soundly, differentiable twice, and what compilers and exporters record."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import library, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import fastbn.torch as ft  # noqa: E402

ACTIVATIONS = (None, "relu", "relu6", "silu", "gelu_tanh", ("leaky_relu", 0.1), ("leaky_relu", -0.5))
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


# PyTorch uses parts of itself that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20261121)


def operands(dtype, shape=(3, 4, 3, 2), format=torch.contiguous_format, grad=True):
    x, residual = (torch.randn(shape).to(dtype).contiguous(memory_format=format) for _ in range(2))
    weight, bias = torch.rand(shape[1]).add(0.5).to(dtype), torch.randn(shape[1]).to(dtype)
    return tuple(t.requires_grad_(grad) for t in (x, weight, bias, residual))


def statistics(channels, dtype):
    return torch.randn(channels).to(dtype), torch.rand(channels).add(0.5).to(dtype)


def encoded(activation):
    return activation if isinstance(activation, tuple) else (activation or "", 0.01)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", (None, "relu", "silu"), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_opcheck_forward(dtype, activation, format):
    x, weight, bias, residual = operands(dtype, format=FORMATS[format])
    rest = (1e-3, *encoded(activation))
    ops = torch.ops.fastbn
    library.opcheck(ops.batch_norm_train.default, (x, weight, bias, residual, *rest))
    library.opcheck(ops.batch_norm_eval.default, (x, *statistics(4, dtype), weight, bias, residual, *rest))


def test_opcheck_without_parameters():
    x = operands(torch.float64)[0]
    ops = torch.ops.fastbn
    library.opcheck(ops.batch_norm_train.default, (x, None, None, None, 1e-3, "", 0.0))
    mean, variance = statistics(4, torch.float64)
    library.opcheck(ops.batch_norm_eval.default, (x, mean, variance, None, None, None, 1e-3, "", 0.0))


@pytest.mark.parametrize("frozen", (False, True))
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck_backward(format, frozen):
    x, weight, bias, dy = operands(torch.float32, format=FORMATS[format])
    ops = torch.ops.fastbn
    detached = [t.detach() for t in (x, weight, bias)]
    y, mean, variance = ops.batch_norm_train(*detached, None, 1e-3, "", 0.0)
    library.opcheck(ops.batch_norm_backward.default, (dy, x, mean, variance, weight, 1e-3, frozen))
    for kept, name in (((y.relu(), None, None, None), "relu"), ((None, weight, bias, dy), "silu")):
        operands_of_both = (dy, x, mean, variance, *kept, 1e-3, name, 0.0, frozen)
        library.opcheck(ops.batch_norm_gate.default, operands_of_both)
        for keep in (False, True):
            library.opcheck(ops.batch_norm_backward_fused.default, (*operands_of_both, keep))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("batches", (None, torch.tensor(3)))
def test_opcheck_update(dtype, batches):
    mean, variance = statistics(4, torch.float64)
    running = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
    library.opcheck(
        torch.ops.fastbn.batch_norm_update.default, (*running, mean, variance, torch.randn(3, 4, 6), 0.1, batches)
    )


def by_operators(x, mean, variance, weight, bias, residual, training, activation):
    name, slope = encoded(activation)
    if training:
        return torch.ops.fastbn.batch_norm_train(x, weight, bias, residual, 1e-3, name, slope)[0]
    return torch.ops.fastbn.batch_norm_eval(x, mean, variance, weight, bias, residual, 1e-3, name, slope)


def at_once(x, mean, variance, weight, bias, residual, training, activation):
    return ft.batch_norm(x, mean, variance, weight, bias, training, 0.0, 1e-3, activation=activation, residual=residual)


@pytest.mark.parametrize("way", (by_operators, at_once))
@pytest.mark.parametrize("training", (True, False), ids=("training", "inference"))
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_first_and_second_derivatives(activation, training, way):
    x, weight, bias, residual = operands(torch.float64, (3, 2, 2, 2))
    mean, variance = statistics(2, torch.float64)

    def function(x, weight, bias, residual):
        return way(x, mean, variance, weight, bias, residual, training, activation)

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, residual))


@pytest.mark.parametrize("way", (by_operators, at_once))
@pytest.mark.parametrize("training", (True, False), ids=("training", "inference"))
def test_third_derivatives(training, way):
    x, weight, bias, residual = operands(torch.float64, (3, 2, 2))
    mean, variance = statistics(2, torch.float64)

    def first(x, weight, dy):
        y = way(x, mean, variance, weight, bias, residual, training, "silu")
        return torch.autograd.grad(y, (x, weight), dy, create_graph=True)

    assert torch.autograd.gradgradcheck(first, (x, weight, residual), atol=1e-4)


def test_a_gradient_penalty_is_pytorchs():
    """The use that double backward has: the norm of a gradient as a part of the loss, float32."""
    results = []
    for package in (nn, ft):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), package.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1))
        x = torch.randn(16, 4, requires_grad=True)
        (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (dx.norm(dim=1) - 1).square().mean().backward()
        results.append([p.grad for p in model.parameters()])
    for wanted, got in zip(*results):
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


# --- recorded calls


class Model(nn.Module):
    """Every kind of module, with and without a residual."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = ft.BatchNorm2d(8)
        self.act = ft.BatchNormReLU2d(8)
        self.smooth = ft.BatchNormAct2d(8, activation="silu", momentum=None)

    def forward(self, x):
        x = self.conv(x)
        return self.smooth(self.act(self.bn(x), x), x).mean((2, 3))


def states(model):
    return {**dict(model.named_buffers()), **{k: p.grad for k, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_compiled_without_a_break_in_the_graph(format):
    eager = Model().to(memory_format=FORMATS[format])
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True)
    for training in (True, True, False):
        eager.train(training)
        other.train(training)
        x = torch.randn(4, 3, 8, 8).contiguous(memory_format=FORMATS[format])
        y, z = eager(x), compiled(x)
        torch.testing.assert_close(z, y, rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        z.square().sum().backward()
        for (name, wanted), got in zip(states(eager).items(), states(other).values()):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, msg=name)
    assert other.smooth.num_batches_tracked == 2


@pytest.mark.slow
def test_compiled_with_sizes_that_change():
    model = Model()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True)
    for n in (2, 5, 3):
        x = torch.randn(n, 3, 6, 6)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # PyTorch's own
def test_compiled_autograd_of_an_eager_forward():
    from torch._dynamo import compiled_autograd

    model, x = Model(), torch.randn(4, 3, 8, 8)
    other = copy.deepcopy(model)
    model(x).square().sum().backward()
    loss = other(x).square().sum()
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        loss.backward()
    for (name, wanted), got in zip(states(model).items(), states(other).values()):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("training", (False, True))
def test_export(tmp_path, training, strict):
    model = Model().train(training)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        copy.deepcopy(model), (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: batch},), strict=strict
    )
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(loaded(x), model(x))
    buffers = dict(loaded.named_buffers())
    for name, wanted in model.named_buffers():
        if not name.endswith("num_batches_tracked"):  # a counter that nothing reads may be dropped
            torch.testing.assert_close(buffers[name], wanted)
    names = {str(node.target) for node in program.graph.nodes}
    assert any(name.startswith("fastbn.batch_norm_") for name in names)


def test_recorded_by_make_fx_and_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    model = Model().eval()
    graph = make_fx(model)(torch.randn(4, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(graph(x), model(x))
    assert "fastbn.batch_norm_eval" in graph.code
    last = torch.empty(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model.train().act(mode.from_tensor(last))
    assert y.shape == last.shape
    assert y.stride() == last.stride()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("training", (False, True))
def test_recorded_before_dispatch(training, dtype):
    from torch.fx.experimental.proxy_tensor import make_fx

    model = ft.BatchNorm2d(3).to(dtype).train(training)
    graph = make_fx(model, pre_dispatch=True)(torch.randn(4, 3, 8, 8, dtype=dtype))
    x = torch.randn(4, 3, 8, 8, dtype=dtype)
    torch.testing.assert_close(graph(x), model(x))
    assert f"fastbn.batch_norm_{'train' if training else 'eval'}" in graph.code


@pytest.mark.parametrize("training", (False, True))
def test_recorded_by_jit_trace(training):
    model = ft.BatchNormReLU2d(3).train(training)
    trace = torch.jit.trace(model, (torch.randn(2, 3, 4, 4),), check_trace=False)
    x = torch.randn(5, 3, 6, 6)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(trace(x), copied(x))
    torch.testing.assert_close(model.running_var, copied.running_var)


def test_symbolic_trace_takes_modules_as_leaves():
    graph = torch.fx.symbolic_trace(Model())
    modules = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert modules == ["conv", "bn", "act", "smooth"]


def test_symbolic_trace_records_hooks_once():
    model = nn.Sequential(nn.Linear(3, 3), ft.BatchNorm1d(3)).eval()
    model[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    recorded, x = copy.deepcopy(torch.fx.symbolic_trace(model)), torch.randn(4, 3)
    torch.testing.assert_close(recorded(x), model(x))


def test_functions_are_those_of_torch_for_other_dtypes_in_a_recorded_call():
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: ft.batch_norm(x, None, None, training=True, momentum=2.0))(torch.randn(4, 3))
    assert "aten" in graph.code
    x = torch.randn(4, 3)
    torch.testing.assert_close(graph(x), F.batch_norm(x, None, None, training=True))
