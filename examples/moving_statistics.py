"""Moving statistics on their way to the true ones, for three momenta.

A moving average starts at 0 (mean) and 1 (variance), and forgets the start like ``momentum ** steps``. A small
momentum is there soon and stays noisy, a large one takes its time: the horizon is about ``1 / (1 - momentum)``
batches. The exact running average of all batches is what ``fastbn.Moments`` keeps.
"""

import numpy as np
from matplotlib import pyplot

import fastbn
from fastbn import plot

rng = np.random.default_rng(0)
mean, deviation = np.array([4.0, -2.0, 1.0]), np.array([1.0, 2.0, 4.0])
batches = rng.normal(mean, deviation, (400, 32, 3)).astype(np.float32)

# One row of plots for each momentum: the mean, and the variance.
figure, axes = pyplot.subplots(3, 2, figsize=(9, 9), sharex=True, layout="constrained")
for row, momentum in zip(axes, (0.8, 0.95, 0.99), strict=True):
    bn = fastbn.BatchNorm(3, momentum=momentum, ddof=1)
    means, variances = [], []
    for x in batches:
        bn(x, training=True)
        means.append(bn.moving_mean.copy())
        variances.append(bn.moving_variance.copy())
    plot.statistics(means, mean, channels=[0, 1, 2], momentum=momentum, ax=row[0])
    plot.statistics(variances, deviation**2, channels=[0, 1, 2], name="variance", momentum=momentum, ax=row[1])
    row[0].set_title(f"momentum {momentum}")
    last = np.abs(np.array(means[-100:]) - mean) / deviation
    print(f"momentum {momentum}: the mean is {last.mean():.3f} deviations off, on average of the last 100 steps")
for ax in axes[:-1].flat:
    ax.set_xlabel("")
for left, right in axes:
    left.legend(loc="center right", bbox_to_anchor=(1, 0.3), ncols=2, fontsize="small")  # in the gap
    right.get_legend().remove()  # the other one holds here too

total = fastbn.moments(batches[0])
for x in batches[1:]:
    total.update(x)
off = np.abs(total.mean - mean) / deviation
print(f"all batches together: {off.mean():.3f} deviations off")
assert off.max() < last.mean()
