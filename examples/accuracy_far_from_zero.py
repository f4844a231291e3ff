"""What a mean far from zero does to a variance, for four ways to compute it.

Sensors, timestamps and prices have deviations that are small beside their mean. The textbook formula
``E[x^2] - E[x]^2`` then subtracts two large numbers and loses twice the digits that ``mean / deviation`` has. Two
passes lose fewer, in float32 still too many once the mean itself is rounded. ``fastbn.moments`` keeps float64 sums
around a shift and loses next to nothing.
"""

import numpy as np
from matplotlib import pyplot

import fastbn
from fastbn import plot

rng = np.random.default_rng(0)
means = np.geomspace(1, 1e6, 13)
errors = {"fastbn": [], "two passes, float32": [], "E[x^2] - E[x]^2, float64": [], "E[x^2] - E[x]^2, float32": []}

for mean in means:
    x = (mean + rng.standard_normal(10_000)).astype(np.float32)
    wide = x.astype(np.longdouble)
    exact = ((wide - wide.mean()) ** 2).mean()
    double = x.astype(np.float64)
    found = (
        fastbn.moments(x[:, None]).variance()[0],
        x.var(),
        (double**2).mean() - double.mean() ** 2,
        (x * x).mean() - x.mean() ** 2,
    )
    for name, value in zip(errors, found, strict=True):
        errors[name].append(float(abs(value / exact - 1) / 2**-23))  # in float32 ulp

figure, ax = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
plot.accuracy(means, errors, ax=ax)
ax.set_xlabel("mean / deviation")

for name, values in errors.items():
    print(f"{name:<26} error at mean 1: {values[0]:9.2g} ulp, at mean 1e6: {values[-1]:9.2g} ulp")
assert max(errors["fastbn"]) < 1
