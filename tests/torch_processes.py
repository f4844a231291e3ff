"""One of several processes of a gloo group: tests/test_torch_distributed.py starts it with rank, world and store.

Every check runs in all processes, in the same order; a failed assertion ends this one with its traceback.
"""

from __future__ import annotations

import copy
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F

import fastbn.torch as ft

RANK, WORLD = int(sys.argv[1]), int(sys.argv[2])


def everywhere(tensor):
    """The same tensor of all ranks."""
    parts = [torch.empty_like(tensor) for _ in range(WORLD)]
    distributed.all_gather(parts, tensor.detach().contiguous())
    return parts


def equal_everywhere(tensor):
    assert all(torch.equal(part, tensor) for part in everywhere(tensor))


def shares(sizes):
    """Where a rank's part of a batch begins and ends."""
    ends = np.cumsum(sizes)
    return int(ends[RANK] - sizes[RANK]), int(ends[RANK])


def check_sync(sizes, dtype, last, momentum=0.3, parameters=None):
    """Parts of any size give the result, the gradients and the statistics of the whole batch."""
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 5, 4, 6, dtype=torch.float64).mul(2).add(3).to(dtype)
    dy = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    if last:
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    begin, end = shares(sizes)
    whole = nn.BatchNorm2d(5, momentum=momentum).double()
    with torch.no_grad():
        whole.weight.uniform_(0.5, 1.5)
        whole.bias.normal_()
    sync = ft.SyncBatchNorm(5, momentum=momentum).to(parameters or dtype)
    sync.load_state_dict(whole.state_dict())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for _ in range(2):
        part = x[begin:end].detach().requires_grad_()
        full = x.double().clone().requires_grad_()
        sync.zero_grad()
        whole.zero_grad()
        y = sync(part)
        y.backward(dy[begin:end])
        z = whole(full)
        z.backward(dy.double())
        assert y.dtype == dtype
        for got, wanted in ((y, z[begin:end]), (part.grad, full.grad[begin:end])):
            torch.testing.assert_close(got.detach().double(), wanted.detach(), rtol=0, atol=tolerance)
        for name in ("weight", "bias"):
            gradient = sum(everywhere(getattr(sync, name).grad)).double()
            torch.testing.assert_close(gradient, getattr(whole, name).grad, rtol=0, atol=tolerance * 50)
        for buffer, wanted in zip(sync.buffers(), whole.buffers()):
            torch.testing.assert_close(buffer.double(), wanted.double(), rtol=0, atol=tolerance)
            equal_everywhere(buffer)
    y = sync.eval()(x[begin:end])
    torch.testing.assert_close(y.double(), whole.eval()(x[begin:end].double()), rtol=0, atol=tolerance)


def check_exact():
    """Moments of parts at an offset merge without loss, and to the same bits on every rank."""
    torch.manual_seed(0)
    x = torch.randn(64 * WORLD, 3) + 1e4
    sync = ft.SyncBatchNorm(3, momentum=1.0)
    y = sync(x[64 * RANK : 64 * (RANK + 1)])
    exact = F.batch_norm(x.double(), None, None, training=True)[64 * RANK : 64 * (RANK + 1)]
    assert (y - exact).abs().max() < 2e-6
    equal_everywhere(sync.running_mean)
    equal_everywhere(sync.running_var)


def check_errors():
    sync = ft.SyncBatchNorm(3)
    for x, kind, words in (
        (torch.zeros(2, 4), ValueError, "input must have 3 channels, got 4"),
        (torch.zeros(2, 0), ValueError, "number of input channels should be non-zero"),
        (torch.zeros(3), ValueError, r"expected at least 2D input (got 1D input)"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "input must be float16, bfloat16, float32 or float64"),
        (torch.zeros(2, 3).double(), TypeError, "got torch.float64 and torch.float32"),
        (torch.zeros(2, 3, device="meta"), TypeError, "input must be in main memory"),
        (torch.zeros(1 if RANK == 0 else 0, 3), ValueError, "Expected more than 1 value per channel when training"),
    ):
        with pytest.raises(kind, match=re.escape(words)):
            sync(x)
    assert torch.equal(sync.running_mean, torch.zeros(3))
    for options, words in (({"momentum": 2.0}, "momentum must be in"), ({"eps": 0.0}, "eps must be positive, got 0.0")):
        with pytest.raises(ValueError, match=words):
            ft.SyncBatchNorm(3, **options)(torch.zeros(2, 3))


def check_statistics_that_are_not_tracked():
    """Evaluation without statistics is of a rank's own batch, and training without tracking leaves them alone."""
    x = torch.arange(12.0).reshape(4, 3) * (RANK + 1)
    if RANK == 0:  # alone: nobody has to make the same call
        alone = ft.SyncBatchNorm(3, track_running_stats=False).eval()
        torch.testing.assert_close(alone(x), F.batch_norm(x, None, None, training=True))
    sync = ft.SyncBatchNorm(3)
    y = sync(x)
    before = copy.deepcopy(sync.state_dict())
    sync.track_running_stats = False
    assert torch.equal(sync(x), y)
    assert all(map(torch.equal, sync.state_dict().values(), before.values()))


def check_views_that_negate():
    x, dy = (torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(i)) for i in range(2))
    results = []
    for view in (torch.clone, lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag):
        given = view(x).requires_grad_()
        y = ft.SyncBatchNorm(3)(given)
        results.append((y, *torch.autograd.grad(y, given, view(dy))))
    torch.testing.assert_close(*results)


def check_second_derivative_is_refused():
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(ft.SyncBatchNorm(3)(x).sum(), x, create_graph=True)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))


def trained(model, part):
    """Losses and state after some steps; the batch of a rank is a part of one batch."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        x, target = torch.randn(4 * WORLD, 3, 6, 6), torch.randint(0, 4, (4 * WORLD,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), target[part]).backward()
        optimizer.step()
    state = model.state_dict()
    return {key.removeprefix("module."): value for key, value in state.items()}


def check_parallel():
    """DistributedDataParallel: converted as PyTorch's own, and synchronized as the whole batch in one process."""
    mine, all_of_it = slice(4 * RANK, 4 * RANK + 4), slice(None)
    parallel = nn.parallel.DistributedDataParallel
    plain = trained(parallel(network()), mine)
    fast = trained(parallel(ft.convert(network())), mine)
    for key, value in plain.items():
        torch.testing.assert_close(fast[key], value, rtol=1e-4, atol=1e-5)
    sync = ft.convert_sync_batchnorm(network())
    assert type(sync[1]) is ft.SyncBatchNorm
    whole = trained(network(), all_of_it)
    for key, value in trained(parallel(sync), mine).items():
        torch.testing.assert_close(value, whole[key], rtol=1e-4, atol=1e-5)
        equal_everywhere(value)


def check_group():
    """Of a group of one, it is an ordinary batch norm; copies keep the group."""
    groups = [distributed.new_group([rank]) for rank in range(WORLD)]
    sync = ft.SyncBatchNorm(3, process_group=groups[RANK])
    x = torch.randn(4 + RANK, 3)
    torch.testing.assert_close(copy.deepcopy(sync)(x), F.batch_norm(x, None, None, training=True))
    assert copy.deepcopy(sync).process_group is groups[RANK]


def main() -> None:
    """Run all checks."""
    warnings.simplefilter("error")
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=RANK, world_size=WORLD)
    even, uneven, lonely = [3] * WORLD, list(range(1, WORLD + 1)), [0] * (WORLD - 1) + [4]
    for sizes in (even, uneven, lonely, lonely[::-1]):
        check_sync(sizes, torch.float32, last=False)
    check_sync(uneven, torch.float64, last=False, momentum=None)
    check_sync(uneven, torch.float32, last=True)
    check_sync(uneven, torch.bfloat16, last=True, parameters=torch.float32)
    check_sync(uneven, torch.bfloat16, last=False)
    check_exact()
    check_errors()
    check_statistics_that_are_not_tracked()
    check_views_that_negate()
    check_second_derivative_is_refused()
    check_group()
    check_parallel()
    empty = ft.SyncBatchNorm(3)
    assert empty(torch.zeros(0, 3)).shape == (0, 3)
    assert torch.equal(empty.running_var, torch.ones(3))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
