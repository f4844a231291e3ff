"""Random configurations and data for all frameworks."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import strategies as st

# Few shapes, as some frameworks compile for each: ranks 2 to 5, few and many channels, one and odd numbers of values.
SHAPES = (
    (2, 1),
    (7, 3),
    (33, 5),
    (64, 8),
    (4, 3, 5),
    (2, 9, 16),
    (3, 2, 4, 5),
    (2, 16, 3, 3),
    (5, 4, 6, 2),
    (2, 3, 2, 3, 4),
)
# For frameworks that compile for every shape and axis, about a second each.
COMPILED = ((33, 5), (4, 3, 5), (3, 2, 4, 5))
EPSILONS = [1e-3, 1e-5, 2e-5, 0.1, 1.0]
SHARES = [0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0]


@dataclasses.dataclass
class Configuration:
    """What a framework is asked for, and a generator of the data."""

    shape: tuple[int, ...]
    axis: int | tuple[int, ...]
    momentum: float  # the share that is kept
    epsilon: float
    center: bool
    scale: bool
    steps: int
    seed: int

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        self.axes = tuple(sorted(a % len(self.shape) for a in axes))
        self.channels = tuple(self.shape[a] for a in self.axes)

    @property
    def values_per_channel(self) -> int:
        return int(np.prod(self.shape)) // int(np.prod(self.channels))

    def batch(self, dtype=np.float32):
        """Data with a mean, a deviation and a sign of skewness for each channel, and now and then a constant one."""
        spread = [n if a in self.axes else 1 for a, n in enumerate(self.shape)]
        x = self.rng.standard_normal(self.shape) * self.rng.uniform(0.5, 2, spread) + self.rng.uniform(-3, 3, spread)
        x[np.broadcast_to(self.rng.random(spread) < 0.05, self.shape)] = 0.75
        return x.astype(dtype)

    def gradient(self, dtype=np.float32):
        return (self.rng.standard_normal(self.shape) + self.rng.uniform(-1, 1)).astype(dtype)

    def parameters(self, dtype=np.float32):
        """Gamma, beta, moving mean and moving variance."""
        gamma, beta, mean = (self.rng.normal(loc, 1.0, self.channels) for loc in (1.0, 0.0, 0.0))
        return [a.astype(dtype) for a in (gamma, beta, mean, self.rng.uniform(0.1, 3.0, self.channels))]

    def mask(self):
        """A mask over all axes but the last, with at least two values that count (one, where there are no more)."""
        mask = self.rng.random(self.shape[:-1]) < 0.7
        mask.reshape(-1)[:2] = True
        return mask


def configurations(*, axes: str = "any", shapes=SHAPES, several: bool = False):
    """Hypothesis strategy of configurations: axes "any", or "second" for channels on axis 1."""
    few = shapes is COMPILED

    @st.composite
    def strategy(draw):
        shape = draw(st.sampled_from(shapes))
        if axes == "second":
            axis = 1
        elif several and len(shape) > 2 and draw(st.booleans()):
            axis = draw(st.sampled_from([(1, 2), (0, -1)]))
        else:
            axis = draw(st.sampled_from((-1, 1)) if few else st.integers(-len(shape), len(shape) - 1))
        return Configuration(
            shape=shape,
            axis=axis,
            momentum=draw(st.sampled_from(SHARES)),
            epsilon=draw(st.sampled_from(EPSILONS)),
            center=draw(st.booleans()),
            scale=draw(st.booleans()),
            steps=draw(st.integers(1, 3)),
            seed=draw(st.integers(0, 2**32 - 1)),
        )

    return strategy()
