"""convert and revert: which modules they change, what stays, and that results stay."""

from __future__ import annotations

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_networks import kinds, network, same, steps  # noqa: E402

import fastbn.torch as ft  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_seed")


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
