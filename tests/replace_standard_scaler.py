"""A pytest plugin: scikit-learn's tests of StandardScaler, with fastbn's scaler in its place."""

from __future__ import annotations

from sklearn.preprocessing.tests import test_data

from fastbn.sklearn import BatchNormScaler

test_data.StandardScaler = BatchNormScaler
