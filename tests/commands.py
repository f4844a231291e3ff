"""The command line as tests call it, and a file for it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

COMMAND = [sys.executable, "-m", "fastbn"]


def args(*parts):
    return [str(part) for part in parts]


def run(*parts, **options):
    return subprocess.run(
        [*COMMAND, *args(*parts)], capture_output=True, text=True, timeout=120, check=False, **options
    )


def saved(folder, rng):
    """A file of 1000 rows of 5 channels, and its values."""
    x = (rng.standard_normal((1000, 5)) * [1, 2, 3, 4, 5] + 100).astype(np.float32)
    np.save(folder / "x.npy", x)
    return folder / "x.npy", x
