"""Settings and fixtures that every test file shares."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import fastbn

SEED = int(os.environ.get("FASTBN_TEST_SEED", "20261121"))

# A first call may build plans, and two test processes may share two cores: no deadlines.
relaxed = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=25, **relaxed)
settings.register_profile("ci", max_examples=50, derandomize=True, database=None, **relaxed)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_configure() -> None:
    # Started in the background a shell may have had this process ignore Ctrl-C, and then so would all that tests start.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    return f"fastbn {fastbn.__version__}, FASTBN_TEST_SEED={SEED}, default threads {fastbn.get_num_threads()}"


@pytest.fixture
def rng() -> np.random.Generator:
    """The generator of a test's own; FASTBN_TEST_SEED, which the header prints, changes all of them."""
    return np.random.default_rng(SEED)


@pytest.fixture
def torch_seed() -> None:
    """The same for PyTorch, whose generator everything draws from."""
    import torch

    torch.manual_seed(SEED)


@pytest.fixture(params=(1, 2, 3), ids=lambda n: f"{n}-threads")
def thread_count(request: pytest.FixtureRequest):
    """Runs the test once for each number of threads, whatever the machine has."""
    with fastbn.threads(request.param):
        yield request.param


@pytest.fixture
def x(rng) -> np.ndarray:
    """A batch of rows."""
    return rng.normal(1, 2, (8, 3)).astype(np.float32)


@pytest.fixture
def image(rng) -> np.ndarray:
    """A batch of images."""
    return rng.normal(1, 2, (4, 2, 3, 5)).astype(np.float32)


@pytest.fixture
def graph():
    """A default graph of TensorFlow 1's that nobody else has."""
    from fastbn.compat import tf_layers

    tf_layers.reset_default_graph()
    yield
    tf_layers.reset_default_graph()
