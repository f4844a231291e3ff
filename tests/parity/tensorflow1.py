"""Asking the real TensorFlow 1, and how far float32 may take it from exact numbers.

Environment variables:

FASTBN_TF1_PYTHON
    The Python that has TensorFlow, by default the one that runs the tests: TensorFlow 2 with tf_keras and tf_slim, or
    TensorFlow 1.13 to 1.15 (Python 3.7). 1.13 and before renormalize in a scheme of their own.
FASTBN_PARITY_EXAMPLES
    Configurations per test.
FASTBN_PARITY_REQUIRE
    With "tensorflow" in it, TensorFlow that cannot be started is an error.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from parity import tf1_process

from fastbn.compat import tf_contrib
from fastbn.compat import tf_layers as tf

# Configurations per test.
EXAMPLES = int(os.environ.get("FASTBN_PARITY_EXAMPLES", "500"))

U = 2.0**-24  # unit roundoff of float32


class Oracle:
    """A process with TensorFlow in it."""

    def __init__(self) -> None:
        python = os.environ.get("FASTBN_TF1_PYTHON", sys.executable)
        self.process = subprocess.Popen(
            [python, Path(tf1_process.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        hello = tf1_process.receive(self.process.stdout) or {"missing": f"{python} did not start"}
        self.version = hello.get("version")
        self.missing = hello.get("missing")

    def __call__(self, request):
        tf1_process.send(self.process.stdin, request)
        reply = tf1_process.receive(self.process.stdout)
        assert reply is not None, "TensorFlow's process has died"
        assert "error" not in reply, reply["error"]
        return reply

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def started():
    """Start the process, or skip and say why."""
    oracle = Oracle()
    try:
        if oracle.missing:
            reason = (
                f"no TensorFlow with tf_keras and tf_slim ({oracle.missing}); FASTBN_TF1_PYTHON names a Python with it"
            )
            assert "tensorflow" not in os.environ.get("FASTBN_PARITY_REQUIRE", ""), reason
            pytest.skip(reason)
        yield oracle
    finally:
        oracle.close()


class Bounds:
    """By how much TensorFlow's float32 may miss the exact results, per channel, in one batch or group of it.

    With u the unit roundoff, m values per channel, A the largest of them, and sums in any order:

    - the mean misses by dm <= m u A, the variance (two passes) by dv <= (m + 6) u v + dm^2,
    - s = 1 / sqrt(v + epsilon) by a factor of ds = dv s^2 / 2 + 4 u,
    - x_hat, which TensorFlow computes as x * s - mean * s, by ex <= s (dm + 4 u A) + X ds, X its largest value.

    Sums of m terms in the gradient miss by m u of the sum of their sizes; that with x_hat in it comes out of
    sum(dy * x) - mean * sum(dy), whose terms are K = A s times larger. Everything is doubled for what is of second
    order.
    """

    def __init__(self, x, axes, epsilon, mean=None, variance=None, weights=None):
        kept = tuple(a for a in range(x.ndim) if a not in axes)
        x = x.astype(np.float64)
        self.kept = kept
        self.m = m = max(int(np.prod([x.shape[a] for a in kept])), 1)
        self.largest = A = np.abs(x).max(kept, keepdims=True)
        trains = mean is None
        if trains:
            w = np.ones(x.shape) if weights is None else np.broadcast_to(_rows(weights, x), x.shape)
            mean = np.average(x, kept, w, keepdims=True)
            variance = np.average((x - mean) ** 2, kept, w, keepdims=True)
        self.mean, self.variance = mean, variance
        v = variance
        self.dm = m * U * A if trains else U * np.abs(self.mean)
        self.dv = (m + 6) * U * v + self.dm**2 if trains else U * v
        s = 1 / np.sqrt(v + epsilon)
        self.s = s
        self.ds = self.dv * s**2 / 2 + 4 * U
        self.x_hat = (x - self.mean) * s
        self.X = np.abs(self.x_hat).max(kept, keepdims=True)
        self.ex = s * (self.dm + 4 * U * (A + np.abs(self.mean))) + self.X * self.ds
        self.K = (A + np.abs(self.mean)) * s
        self.trains = trains

    def y(self, gamma, beta, r=1.0, d=0.0):
        """Of the result; r and d are the corrections of batch renormalization, or of an adjustment."""
        corrected = r * self.ex + self.X * r * 2 * self.ds + 2 * np.abs(d) * self.ds
        corrected = corrected + r * self.s * (self.dm + 4 * U * self.largest)
        size = np.abs(gamma) * (r * (self.X + self.K) + np.abs(d)) + np.abs(beta)
        return 2 * (np.abs(gamma) * corrected + 8 * U * size)

    def dx(self, gamma, dy, r=1.0):
        m, X, K = self.m, self.X, self.K
        D = np.abs(dy).max(self.kept, keepdims=True)
        size = np.abs(gamma) * r * self.s * D
        if not self.trains:
            return 2 * size * (self.ds + 8 * U)
        b = m * U * (2 * K + X) + self.ex
        inner = m * U + self.ex * X + X * b + (8 * U + 2 * self.ds) * (2 + X + X**2)
        return 2 * size * inner

    def dgamma(self, dy, r=1.0, d=0.0):
        m = self.m
        D = np.abs(dy).max(self.kept, keepdims=True)
        return (
            2 * m * D * (r * (m * U * (2 * self.K + self.X) + self.ex + self.X * 2 * self.ds) + 4 * m * U * np.abs(d))
        )

    def dbeta(self, dy):
        D = np.abs(dy).max(self.kept, keepdims=True)
        return 2 * self.m * self.m * U * D


def _rows(weights, x):
    return np.asarray(weights, np.float64).reshape((-1,) + (1,) * (x.ndim - 1))


def close(actual, wanted, bound, what):
    """Assert that two arrays agree within a bound that is broadcast to them."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape, (what, actual.shape, wanted.shape)
    excess = np.abs(actual - wanted) - np.broadcast_to(bound, actual.shape)
    assert not (excess > 0).any(), f"{what}: off by {np.abs(actual - wanted).max():.3g}, {excess.max():.3g} too much"


def ours(request, api, scheme):
    """Do with fastbn what the process does with TensorFlow; yields a reply that is filled step by step."""
    tf.reset_default_graph()
    tf.set_renorm_scheme(scheme)
    kwargs = dict(request["kwargs"])
    if request.get("adjustment") is not None:
        kwargs["adjustment"] = lambda shape: request["adjustment"]
    named, flag = ("name", "training") if api == "layers" else ("scope", "is_training")
    function = tf.batch_normalization if api == "layers" else tf_contrib.batch_norm

    def call(x, training, **more):
        with contextlib.ExitStack() as stack:
            for scope in request["scopes"]:
                stack.enter_context(tf.variable_scope(scope))
            numbered = 0 if more else request.get("before", 0)
            for _ in range(numbered):
                function(x, **kwargs, **{flag: True})
            return function(x, **kwargs | more, **{flag: training})

    batches = request["batches"]
    prefix = "".join(scope + "/" for scope in request["scopes"])
    default = "batch_normalization" if api == "layers" else "BatchNorm"
    given = kwargs.get(named) or default + (f"_{request['before']}" if request.get("before") else "")
    own = prefix + given
    reply = {"steps": [], "own": own}
    for step, (x, dy) in enumerate(batches):
        if request.get("weights") is not None:
            kwargs["batch_weights"] = request["weights"][step]
        if step == 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(x, False)  # makes the variables
            variables = [v for v in tf.global_variables() if v.name.startswith(own + "/")]
            for variable in variables:
                value = request["values"].get(variable.op_name.rpartition("/")[2])
                if value is not None:
                    variable.assign(value.reshape(variable.shape))
            reply["variables"] = [[v.name, list(v.shape)] for v in variables]
            reply["trainable"] = [v.name for v in tf.trainable_variables()]
            reply["global"] = [v.name for v in tf.global_variables()]
            for update in tf.get_collection("update_ops") + tf.get_collection("mine"):
                update()  # of the layers that took names
            yield reply
        training = step < len(batches) - 1
        y = call(x, training, **{named: given, "reuse": True})
        layer = tf.get_layer(own)
        dx = layer.backward(dy)
        updates = tf.get_collection(kwargs.get("updates_collections", "update_ops") or "none")
        if training:
            reply["updates"] = [u.name for u in updates]
        for update in updates:
            update()
        values = {v.name: v.eval() for v in variables}
        reply["steps"].append({"y": y, "dx": dx, "grads": layer.grads, "values": values})
        yield reply


def values_of(variables):
    """Return values by the last part of their names."""
    return {name.removesuffix(":0").rpartition("/")[2]: value.astype(np.float64) for name, value in variables.items()}


def blend_bound(error, share, old, new, new_error):
    """Of ``old -= (old - new) * (1 - share)`` in float32."""
    return share * error + (1 - share) * new_error + 4 * U * (np.abs(old) + np.abs(new))


def compare(real, request, api, scheme, *, axes, epsilon, ddof, momentum, groups=1):
    """Compare step by step; `axes` are the channel axes, ascending."""
    wanted = real(request)
    own = ours(request, api, scheme)
    reply = next(own)
    for key in ("variables", "trainable", "global"):
        assert reply[key] == wanted[key], key
    x0 = request["batches"][0][0]
    wide = tuple(n if a in axes else 1 for a, n in enumerate(x0.shape))
    # Errors that TensorFlow's moving statistics may have by now.
    errors = {"moving_mean": np.zeros(wide), "moving_variance": np.zeros(wide)}
    state = values_of(_initial(reply["variables"], request, scheme))
    renorm = request["kwargs"].get("renorm", False)
    steps = len(request["batches"])
    biased_error, biased = np.zeros(wide), np.zeros(wide)
    for step, (x, dy) in enumerate(request["batches"]):
        if renorm and step:  # from the same float32 numbers: the correction depends on them
            tf.load_variables(wanted["steps"][step - 1]["values"])
            state = values_of(wanted["steps"][step - 1]["values"])
            errors = {name: np.zeros(wide) for name in errors}
        next(own)
        found, there = reply["steps"][step], wanted["steps"][step]
        gamma = state.get("gamma", np.ones(wide)).reshape(wide)
        beta = state.get("beta", np.zeros(wide)).reshape(wide)
        training = step < steps - 1
        weights = None if request.get("weights") is None else request["weights"][step]
        r, d = 1.0, 0.0
        parts = [slice(g, None, groups) for g in range(groups)] if training else [slice(None)]
        if training:
            bounds = [Bounds(x[part], axes, epsilon, weights=weights) for part in parts]
            mean = np.mean([b.mean for b in bounds], 0)
            variance = np.mean([b.variance for b in bounds], 0)
            dm, dv = np.max([b.dm for b in bounds], 0), np.max([b.dv for b in bounds], 0)
            if renorm:
                r, d, dr, dd = _correction(state, mean, variance, dm, dv, epsilon, request, scheme, wide)
            if request.get("adjustment") is not None:
                p, q = (v.astype(np.float64).reshape(wide) for v in request["adjustment"])
                r, d = p * r, p * d + q
        else:
            mean, variance = (state[n].reshape(wide) for n in ("moving_mean", "moving_variance"))
            bound = Bounds(x, axes, epsilon, mean, variance)
            bound.dm = bound.dm + errors["moving_mean"]
            bound.ds = bound.ds + errors["moving_variance"] * bound.s**2
            bound.ex = bound.ex + bound.s * errors["moving_mean"] + bound.X * errors["moving_variance"] * bound.s**2
            bounds = [bound]
        dgamma = dbeta = 0.0
        for part, bound in zip(parts, bounds):
            extra = np.abs(gamma) * (bound.X * dr + dd) if renorm and training else 0.0
            y_bound = bound.y(gamma, beta, np.abs(r), d) + 2 * extra
            close(found["y"][part], there["y"][part], y_bound, f"y of step {step}")
            dx_bound = bound.dx(gamma, dy[part], np.abs(r))
            if renorm and training:
                dx_bound = dx_bound * (1 + dr / np.maximum(np.abs(r), 1e-30)) + dr * _size(gamma, bound, dy[part])
            close(found["dx"][part], there["dx"][part], dx_bound, f"dx of step {step}")
            dgamma = dgamma + bound.dgamma(dy[part], np.abs(r), d)
            dbeta = dbeta + bound.dbeta(dy[part])
            if renorm and training:
                dgamma = dgamma + 2 * bound.m * np.abs(dy[part]).max() * (bound.X * dr + dd)
        for name, bound in (("gamma", dgamma), ("beta", dbeta)):
            assert (name in found["grads"]) == (name in there["grads"])
            if name in found["grads"]:
                full = np.broadcast_to(bound, wide)
                close(found["grads"][name], there["grads"][name], full.reshape(found["grads"][name].shape), f"d{name}")
        # What the updates made of the statistics.
        new, new_there = values_of(found["values"]), values_of(there["values"])
        updated = training and (bool(wanted["updates"]) or request["kwargs"].get("updates_collections", 0) is None)
        if updated:
            m = bounds[0].m
            factor = m / max(m - ddof, 1)
            if renorm:
                for name in new:
                    close(new[name], new_there[name], _renorm_bound(name, state, new_there, locals()), name)
            else:
                errors["moving_variance"] = blend_bound(
                    errors["moving_variance"],
                    momentum,
                    state["moving_variance"].reshape(wide),
                    variance * factor,
                    dv * factor * (1 + 4 * U) + 4 * U * variance,
                )
                if "biased" in new:
                    t, weight = step + 1, 1 - momentum ** (step + 1)
                    biased_error = blend_bound(biased_error, momentum, biased, mean, dm)
                    biased = new_there["biased"].reshape(wide)
                    assert new["local_step"] == new_there["local_step"] == t
                    close(new["biased"].reshape(wide), biased, biased_error, "biased")
                    # 1 - momentum**t cancels in float32.
                    errors["moving_mean"] = (biased_error + 8 * U * np.abs(biased) / weight) / weight
                else:
                    errors["moving_mean"] = blend_bound(
                        errors["moving_mean"], momentum, state["moving_mean"].reshape(wide), mean, dm
                    )
                for name, error in errors.items():
                    close(new[name].reshape(wide), new_there[name].reshape(wide), 2 * error, f"{name} of step {step}")
        else:
            for name, value in there["values"].items():
                if not errors["moving_mean"].any():
                    np.testing.assert_array_equal(found["values"][name], value)
        state = new
    return reply


def _initial(variables, request, scheme):
    """Return the values that variables begin with."""
    first = {}
    for name, shape in variables:
        last = name.removesuffix(":0").rpartition("/")[2]
        default = 1.0 if last in ("gamma", "moving_variance", "moving_stddev") else 0.0
        if last == "renorm_stddev" and scheme == "keras":
            default = 1.0
        first[name] = np.asarray(request["values"].get(last, np.full(shape, default)), np.float32).reshape(shape)
    return first


def _size(gamma, bound, dy):
    D = np.abs(dy).max(bound.kept, keepdims=True)
    return np.abs(gamma) * bound.s * D * (2 + bound.X**2)


def _correction(state, mean, variance, dm, dv, epsilon, request, scheme, wide):
    """Return r and d of batch renormalization, and by how much TensorFlow may miss them."""
    sigma = np.sqrt(variance + epsilon)
    d_sigma = dv / (2 * sigma) + 2 * U * sigma
    mean_r, sigma_r = state["renorm_mean"].reshape(wide), state["renorm_stddev"].reshape(wide)
    if scheme == "tf1":
        mean_r = mean_r + (1 - state["renorm_mean_weight"]) * mean
        sigma_r = sigma_r + (1 - state["renorm_stddev_weight"]) * sigma
    else:
        sigma_r = np.maximum(sigma_r, np.sqrt(epsilon))
    r, d = sigma / sigma_r, (mean - mean_r) / sigma_r
    relative = d_sigma / sigma_r + 4 * U
    dr = d_sigma / sigma_r + r * relative
    dd = (2 * dm + 4 * U * (np.abs(mean) + np.abs(mean_r))) / sigma_r + np.abs(d) * relative
    clip = request["kwargs"].get("renorm_clipping") or {}
    r = np.clip(r, clip.get("rmin"), clip.get("rmax")) if {"rmin", "rmax"} & set(clip) else r
    d = np.clip(d, -clip["dmax"], clip["dmax"]) if "dmax" in clip else d
    return r, d, dr, dd


def _renorm_bound(name, state, after, step):
    """Return by how much TensorFlow may miss an average of batch renormalization in one step."""
    mean, variance, dm, dv, epsilon = (step[n] for n in ("mean", "variance", "dm", "dv", "epsilon"))
    momentum, kwargs = step["momentum"], step["request"]["kwargs"]
    own = kwargs.get("renorm_momentum", kwargs.get("renorm_decay", 0.99))
    sigma = np.sqrt(variance + epsilon)
    d_sigma = dv / (2 * sigma) + 2 * U * sigma
    shape = after[name].shape

    def of(which, value, error, share):
        old = state[which].reshape(step["wide"])
        return 2 * blend_bound(0.0, share, old, value, error)

    if name in ("gamma", "beta"):
        return 0.0
    if name.endswith("weight"):
        return 8 * U
    if name == "renorm_mean":
        bound = of(name, mean, dm, own)
    elif name == "renorm_stddev":
        bound = of(name, sigma, d_sigma, own)
    elif step["scheme"] == "keras":
        if name == "moving_mean":
            bound = of(name, mean, dm, momentum)
        else:
            bound = of("moving_stddev", sigma, d_sigma, momentum)
            if name == "moving_variance":
                deviation = after["moving_stddev"].reshape(step["wide"])
                bound = 2 * deviation * bound + 4 * U * (deviation**2 + epsilon)
    else:
        # The averages are divided by their weights, which are 1 - momentum after one step.
        which, value, error = ("mean", mean, dm) if name == "moving_mean" else ("stddev", sigma, d_sigma)
        weight = after[f"renorm_{which}_weight"]
        average = after[f"renorm_{which}"].reshape(step["wide"]) / weight
        missed = (of(f"renorm_{which}", value, error, own) + 16 * U * np.abs(average)) / weight
        if name == "moving_variance":
            missed, average = 2 * np.abs(average) * missed + 4 * U * average**2, average**2
        bound = of(name, average, missed, momentum)
    return np.broadcast_to(bound, step["wide"]).reshape(shape)


def run_program(program):
    """Do with fastbn what the process does with a list of steps that make names."""
    tf.reset_default_graph()
    x, stack = np.arange(12, dtype=np.float32).reshape(4, 3), []
    reply = {"failed": None, "scopes": [], "layers": []}
    for number, (what, name, reuse) in enumerate(program):
        try:
            if what == "enter":
                context = tf.variable_scope(name, reuse=reuse)
                reply["scopes"].append(context.__enter__().name)
                stack.append(context)
            elif what == "enter default":
                context = tf.variable_scope(None, name)
                reply["scopes"].append(context.__enter__().name)
                stack.append(context)
            elif what == "exit" and stack:
                stack.pop().__exit__(None, None, None)
            elif what == "layers":
                tf.batch_normalization(x, training=True, name=name, reuse=reuse)
            elif what == "contrib":
                tf_contrib.batch_norm(x, scope=name, reuse=reuse)
            elif what == "object":
                layer = tf.BatchNormalization(name=name)
                layer.apply(x, training=True)
                layer.apply(x, training=True)
                reply["layers"].append([layer.name, layer.scope_name])
        except ValueError:
            reply["failed"] = number
            break
    while stack:
        stack.pop().__exit__(None, None, None)
    reply["variables"] = [v.name for v in tf.global_variables()]
    reply["trainable"] = [v.name for v in tf.trainable_variables()]
    reply["updates"] = len(tf.get_collection("update_ops"))
    return reply
