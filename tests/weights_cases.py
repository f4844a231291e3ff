"""Weights as frameworks hold them, for the tests of converters."""

from __future__ import annotations

import numpy as np

import fastbn
from fastbn.compat.keras import BatchNormalization

C = 3
GAMMA, BETA, MEAN = (np.arange(1, C + 1, dtype=np.float32) * k for k in (1, 10, 100))
VARIANCE = np.array([0.5, 1.0, 2.0], np.float32)
STATE = dict(zip(("gamma", "beta", "moving_mean", "moving_variance"), (GAMMA, BETA, MEAN, VARIANCE)))
TORCH = dict(zip(("weight", "bias", "running_mean", "running_var"), STATE.values())) | {
    "num_batches_tracked": np.array(7, np.int64)
}
ONNX = dict(zip(("scale", "B", "input_mean", "input_var"), STATE.values()))
LINEN = {"params": {"scale": GAMMA, "bias": BETA}, "batch_stats": {"mean": MEAN, "var": VARIANCE}}
TF1 = {f"net/bn/{name}:0": value for name, value in STATE.items()}


def without(mapping, *names):
    return {k: v for k, v in mapping.items() if k not in names}


def prefixed(mapping, prefix):
    return {prefix + k: v for k, v in mapping.items()}


def layer(**arguments):
    bn = fastbn.BatchNorm(C, **arguments)
    has = {"gamma": bn.scale, "beta": bn.center, "moving_mean": bn.track, "moving_variance": bn.track}
    for name, value in STATE.items():
        if has[name]:
            setattr(bn, name, value)
    return bn


def keras_layer(axis, **arguments):
    made = BatchNormalization(axis=axis, **arguments)
    made.build((None, C, C, C))
    return made


MODEL = {
    "conv.weight": np.zeros((C, C, 1, 1), np.float32),
    **prefixed(TORCH, "layer1.bn."),
    **prefixed(without(TORCH, "weight", "bias"), "layer1.bn2."),
}
