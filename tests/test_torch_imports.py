"""fastbn.torch beside PyTorch in one process: its threads, either order of imports, forked workers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import fastbn  # noqa: E402
import fastbn.torch as ft  # noqa: E402
from fastbn.torch import bridge  # noqa: E402


def test_no_more_threads_than_pytorch():
    seen = []
    before = torch.get_num_threads()
    with fastbn.threads(3):
        torch.set_num_threads(1)
        try:
            bridge.limited(lambda: seen.append(fastbn.get_num_threads()))
        finally:
            torch.set_num_threads(before)
    assert seen == [1]


SCRIPTS = {
    "torch first": "import torch; import fastbn.torch as ft",
    "fastbn first": "import fastbn; import fastbn.torch as ft; import torch",
    "kernels first": "import numpy, fastbn; fastbn.moments(numpy.ones((400, 400))); import torch, fastbn.torch as ft",
}
CHECK = """
x = torch.randn(16, 16, 40, 40)
bn = ft.BatchNorm2d(16)
y = bn(torch.nn.Conv2d(16, 16, 3)(x)); y.sum().backward()
plain = torch.nn.functional.batch_norm(x, None, None, training=True)
assert (ft.batch_norm(x, None, None, training=True) - plain).abs().max() < 1e-5
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", SCRIPTS)
def test_import_orders(order):
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPTS[order] + CHECK],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_import_fastbn_does_not_load_torch():
    code = "import sys, fastbn; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_pytorch_the_extra_is_named():
    code = "import sys; sys.modules['torch'] = None\nimport fastbn.torch"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert 'ImportError: fastbn.torch needs PyTorch: pip install "fastbn[torch]"' in run.stderr


class Rows(torch.utils.data.Dataset):
    """Normalizes in the worker."""

    def __init__(self):
        self.bn = ft.BatchNorm1d(4).eval()

    def __len__(self):
        return 6

    def __getitem__(self, index):
        with torch.no_grad():
            return self.bn(torch.full((50000, 4), float(index)))[0]


def test_in_forked_workers():
    """After the parent's team of threads has started: it does not survive the fork."""
    ft.BatchNorm2d(16)(torch.randn(16, 16, 40, 40))
    loader = torch.utils.data.DataLoader(
        Rows(), batch_size=3, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    rows = torch.cat(list(loader))
    torch.testing.assert_close(rows[:, 0], torch.arange(6.0) / np.sqrt(1 + 1e-5), rtol=0, atol=1e-5)  # 2e-6 of 5
