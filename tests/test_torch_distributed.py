"""SyncBatchNorm and DistributedDataParallel: real processes over gloo, and what one process shows."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import fastbn.torch as ft  # noqa: E402

PROGRAM = Path(__file__).with_name("torch_processes.py")

if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)


@pytest.mark.slow
@pytest.mark.parametrize("world", (2, 3))
def test_processes(world, tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    outputs = [tmp_path / f"output-{rank}" for rank in range(world)]
    processes = []
    try:
        for rank, output in enumerate(outputs):
            arguments = [sys.executable, PROGRAM, str(rank), str(world), str(tmp_path / "store")]
            with output.open("w") as file:
                processes.append(subprocess.Popen(arguments, env=environment, stdout=file, stderr=file))
        # One that fails leaves the others waiting for it.
        deadline = time.monotonic() + 180
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            assert time.monotonic() < deadline, "the processes hang"
            time.sleep(0.05)
        assert all(p.poll() == 0 for p in processes), "\n".join(output.read_text() for output in outputs)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_without_a_group_it_is_a_batch_norm():
    sync, plain = ft.SyncBatchNorm(3, momentum=0.5), nn.BatchNorm2d(3, momentum=0.5)
    for training in (True, False):
        x = torch.randn(4, 3, 5, 5)
        torch.testing.assert_close(sync.train(training)(x), plain.train(training)(x))
    torch.testing.assert_close(sync.running_var, plain.running_var)
    assert list(sync.state_dict()) == list(plain.state_dict())
    for shape, words in (((3,), "expected at least 2D input"), ((2, 0), "number of input channels should be non-zero")):
        with pytest.raises(ValueError, match=words):
            sync(torch.zeros(shape))


def test_conversion_and_back():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), ft.BatchNorm1d(3), nn.Sequential(nn.BatchNorm3d(2).eval())
    )
    before = copy.deepcopy(model)
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    assert ft.SyncBatchNorm.convert_sync_batchnorm(model, "a group") is model
    assert [type(m) for m in (model[1], model[2], model[3][0])] == [ft.SyncBatchNorm] * 3
    assert model[1].process_group == "a group"
    assert not model[3][0].training
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == tensors
    ft.revert(model)
    assert [type(m) for m in (model[1], model[2], model[3][0])] == [nn.BatchNorm2d, nn.BatchNorm1d, nn.BatchNorm3d]
    assert vars(model[1]).keys() == vars(before[1]).keys()
    model.load_state_dict(before.state_dict())


def test_copies_and_pickles():
    sync = ft.SyncBatchNorm(3, process_group=object())
    assert copy.deepcopy(sync).process_group is sync.process_group
    assert pickle.loads(pickle.dumps(sync)).process_group is None
    x = torch.randn(4, 3)
    torch.testing.assert_close(pickle.loads(pickle.dumps(sync))(x), F.batch_norm(x, None, None, training=True))
