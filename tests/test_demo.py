"""The demo: its network's gradients are right, its numbers are sane, its files are there."""

import subprocess
import sys

import numpy as np
import pytest

import fastbn
from fastbn.cli import main
from fastbn.demo import timing
from fastbn.demo.network import Adam, Network, cross_entropy

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


@pytest.mark.parametrize("batch_norm", [True, False])
def test_gradients_against_central_differences(rng, batch_norm):
    network = Network((5, 7, 6, 4), rng, batch_norm=batch_norm, dtype=np.float64)
    for bias in network.biases:  # with biases of 0, a row without active units would sit on the kink of relu
        bias[...] = rng.standard_normal(bias.shape)
    x, labels = rng.standard_normal((12, 5)), rng.integers(0, 4, 12)
    _, gradients = network.train_gradients(x, labels)
    assert len(gradients) == len(network.parameters())
    step = 1e-6
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        assert gradient.shape == parameter.shape
        numeric = np.empty_like(parameter)
        for index in np.ndindex(parameter.shape):
            original = parameter[index]
            parameter[index] = original + step
            above, _ = cross_entropy(network.batch_logits(x), labels)
            parameter[index] = original - step
            below, _ = cross_entropy(network.batch_logits(x), labels)
            parameter[index] = original
            numeric[index] = (above - below) / (2 * step)
        np.testing.assert_allclose(gradient, numeric, atol=2e-8)


def test_cross_entropy_of_a_uniform_guess(rng):
    loss, gradient = cross_entropy(np.zeros((6, 10)), rng.integers(0, 10, 6))
    assert loss == pytest.approx(np.log(10))
    np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-15)


def test_adam_moves_by_the_rate_at_first():
    parameter = np.zeros(3)
    Adam([parameter], 0.1).step([np.array([5.0, -0.01, 1e3])])
    np.testing.assert_allclose(parameter, [-0.1, 0.1, -0.1], rtol=1e-4)


def test_batch_pass_leaves_moving_statistics(rng):
    network = Network((5, 7, 4), rng)
    x = rng.standard_normal((12, 5)).astype(np.float32)
    network.batch_logits(x)
    (found,) = network.statistics(x)
    np.testing.assert_allclose(found.mean, (x @ network.weights[0]).mean(0), atol=1e-6)
    assert not network.norms[0].moving_mean.any()


def test_the_numpy_formula_agrees(rng):
    x, dy = rng.standard_normal((2, 40, 7)).astype(np.float32)
    gamma, beta = rng.standard_normal((2, 7)).astype(np.float32)
    y, cache = fastbn.batch_norm_forward(x, gamma=gamma, beta=beta, training=True, update=False)
    expected = (y, *fastbn.batch_norm_backward(dy, cache))
    for value, other in zip(timing.numpy_formula(x, dy, gamma, beta), expected, strict=True):
        np.testing.assert_allclose(value, other, atol=2e-5)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    from fastbn import demo

    return demo.run(tmp_path_factory.mktemp("demo"), quick=True, seed=0, progress=False)


def test_accuracies(quick):
    found = quick.accuracy
    assert found.moving > 0.93
    assert found.exact > 0.92
    assert found.batch > 0.92
    assert found.moving > found.untouched + 0.1
    assert found.moving > found.without
    assert len(found.warnings) == 2


def test_moving_statistics_come_close(quick):
    assert [(row.layer, row.weights) for row in quick.deviations] == [
        (layer, weights) for layer in (1, 2) for weights in ("moving", "held still")
    ]
    for moving, held in zip(quick.deviations[::2], quick.deviations[1::2], strict=True):
        assert moving.mean_median < 0.2
        assert moving.variance_median < 0.2
        assert held.mean_max < moving.mean_max
        assert held.mean_median < 0.05


def test_rates_and_timings(quick):
    assert [row.rate for row in quick.rates] == sorted(row.rate for row in quick.rates)
    assert all(row.final[True] > 0.85 for row in quick.rates)
    assert all(0 < value < 1 for row in quick.timings for value in row.seconds.values())


def test_plots(quick):
    for path in quick.plots:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 20_000


def test_the_command_prints_the_same_accuracies(quick, tmp_path, capsys):
    assert main(["demo", "--quick", "--output", str(tmp_path / "new"), "--quiet"]) == 0
    out = capsys.readouterr().out
    for value in (quick.accuracy.moving, quick.accuracy.untouched, quick.accuracy.without):
        assert f"{100 * value:5.1f} %" in out
    assert "UntrainedWarning" in out
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["accuracy.png", "statistics.png"]


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "tqdm"])
def test_what_is_missing_is_named(module, tmp_path):
    code = f"""
import sys
sys.modules[{module!r}] = None
from fastbn.cli import main
sys.exit(main(["demo", "--output", sys.argv[1]]))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "new")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1
    assert 'pip install "fastbn[demo]"' in run.stderr
    assert not (tmp_path / "new").exists()
