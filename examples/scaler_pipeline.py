"""A scaler in a scikit-learn pipeline: cross validation on the wine data, beside StandardScaler.

Needs the extra ``sklearn``.
"""

import warnings

import numpy as np
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fastbn.sklearn import BatchNormScaler

x, y = load_wine(return_X_y=True)
x = x.astype(np.float32)

scores = {}
for scaler in (None, StandardScaler(), BatchNormScaler()):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a scaler it does not converge: that is the point
        scores[scaler] = cross_val_score(make_pipeline(scaler, LogisticRegression(max_iter=50)), x, y, cv=5)
    name = "no scaler" if scaler is None else type(scaler).__name__
    print(f"{name:16} accuracy {scores[scaler].mean():.3f} +- {scores[scaler].std():.3f}")

none, theirs, ours = scores.values()
assert abs(ours.mean() - theirs.mean()) < 0.01
assert ours.mean() > none.mean()

# float32 stays float32; frames come back as frames, with their names.
scaler = BatchNormScaler().fit(x)
assert scaler.transform(x).dtype == np.float32
np.testing.assert_allclose(scaler.inverse_transform(scaler.transform(x)), x, rtol=1e-5)

# Two halves that were fitted apart add up to the whole.
both = BatchNormScaler().fit(x[:90]) + BatchNormScaler().fit(x[90:])
np.testing.assert_allclose(both.scale_, scaler.scale_, rtol=1e-12)
print(f"fitted in two halves and added: {both.n_samples_seen_} samples, the same scales")
