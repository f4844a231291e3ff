"""The commands that the pages about other packages name print what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import ranks, scaler


def test_scaler(monkeypatch, capsys):
    pytest.importorskip("sklearn", minversion="1.6")
    monkeypatch.setattr(scaler, "SHAPES", ((64, 3),))
    monkeypatch.setattr(scaler, "REST", 0)
    assert scaler.main(["--rounds", "1", "--dtypes", "float32", "float64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 10
    for name in ("partial_fit, NaN", "partial_fit, sample_weight", "transform, copy=False"):
        assert sum(f"| {name} |" in line for line in lines) == 2
    assert "| 64 x 3 | float32 | partial_fit |" in lines[2]
    assert lines[2].endswith("| 8.0 |")
    monkeypatch.setattr(scaler, "GOALS", {"transform": 1e9})
    assert scaler.main(["--rounds", "1", "--check"]) == 1
    capsys.readouterr()
    assert scaler.main(["--rounds", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["method"] == "partial_fit"


def test_a_busy_round_does_not_decide(monkeypatch):
    """The ratio is the median over rounds, of blocks that lie side by side."""
    pytest.importorskip("sklearn", minversion="1.6")
    monkeypatch.setattr(scaler, "REST", 0)

    class Fake:
        def __init__(self, times):
            self.times = iter(times)

        def timed(self):
            return next(self.times)

    calls = scaler.BLOCK + 1
    ours = Fake([1.0] * calls + [50.0] * calls + [2.0] * calls)
    theirs = Fake([4.0] * calls + [4.0] * calls + [8.0] * calls)
    seconds = scaler.measure({"method": (ours, theirs)}, 3)["method"]
    assert seconds == (1.0, 4.0, 4.0)


def test_rounds_of_the_model():
    """By hand: what is sent doubles, 1 + 2 + 1 parts for 5 ranks."""
    latency, bandwidth = 1.0, 8.0  # a number takes a second
    assert ranks.allgather(1, 10, latency, bandwidth) == 0
    assert ranks.allgather(2, 10, latency, bandwidth) == 1 + 10
    assert ranks.allgather(5, 10, latency, bandwidth) == 3 + 40
    assert ranks.allreduce(1, 10, latency, bandwidth) == 0
    assert ranks.allreduce(2, 10, latency, bandwidth) == pytest.approx(1 + 10)
    assert ranks.allreduce(4, 10, latency, bandwidth) == pytest.approx(4 + 2 * 0.75 * 10)  # in halves: cheaper than 22
    assert ranks.allreduce(5, 1, latency, bandwidth) == pytest.approx(4 * 2)  # by doubling: two rounds, and two more


def test_crossing():
    latency, bandwidth = ranks.NETWORKS["InfiniBand"]
    found = ranks.crossing(256, latency, bandwidth, 2.5e-7)
    assert 4 < found < 200
    table = {row["ranks"]: row for row in ranks.simulate(256, latency, bandwidth, 2.5e-7)}
    assert table[2]["allgather"] < table[2]["allreduce"]
    assert table[10000]["allgather"] > 10 * table[10000]["allreduce"]
    assert table[4]["received"] == 3 * 513 * 8
    assert ranks.crossing(1, 1.0, 1e30, 0.0) is None  # latency alone: one exchange is always cheaper than two


def test_ranks_prints(capsys):
    assert ranks.main(["--channels", "8"]) == 0
    assert "| 10000 |" in capsys.readouterr().out
    assert ranks.main(["--channels", "8", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3
