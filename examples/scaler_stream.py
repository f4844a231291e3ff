"""A stream that drifts: a sensor whose offset and noise change, scaled batch by batch.

With ``momentum`` the scaler forgets: what was seen before each batch counts for so much. Needs the extras ``sklearn``
and ``plot``.
"""

import numpy as np
from matplotlib import pyplot

from fastbn import plot
from fastbn.sklearn import BatchNormScaler

rng = np.random.default_rng(0)
remembering, forgetting = BatchNormScaler(), BatchNormScaler(momentum=0.9)
print("batch   sensor mean, deviation   scaled by all so far   by what was seen lately")
worst = {"all": 0.0, "lately": 0.0}
offsets, means = [], []
for batch in range(200):
    offset, noise = 20 + 0.05 * batch, 1 + 0.01 * batch
    x = rng.normal(offset, noise, (64, 1)).astype(np.float32)
    remembering.partial_fit(x)
    forgetting.partial_fit(x)
    offsets.append([offset, offset])
    means.append([remembering.mean_[0], forgetting.mean_[0]])
    # Where the next values will come from, as each scaler sees them; 0 and 1 would be right.
    seen = {
        "all": ((offset - remembering.mean_[0]) / remembering.scale_[0], noise / remembering.scale_[0]),
        "lately": ((offset - forgetting.mean_[0]) / forgetting.scale_[0], noise / forgetting.scale_[0]),
    }
    if batch >= 100:
        worst = {name: max(worst[name], abs(seen[name][0])) for name in worst}
    if batch % 40 == 39:
        everything, lately = seen["all"], seen["lately"]
        print(f"{batch + 1:5}   {offset:11.2f}, {noise:9.2f}   {everything[0]:9.2f}, {everything[1]:9.2f}"
              f"   {lately[0]:12.2f}, {lately[1]:9.2f}")  # fmt: skip

figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
for channel, (ax, title) in enumerate(zip(axes, ("of all so far", "with momentum 0.9"), strict=True)):
    plot.statistics(means, offsets, channels=[channel], ax=ax)
    ax.set(title=title, xlabel="batch")
    ax.get_legend().remove()
figure.suptitle("The sensor's mean (thin) and the scaler's (bold)")

assert worst["lately"] < 0.5 < worst["all"]
assert forgetting.n_samples_seen_ == 200 * 64
