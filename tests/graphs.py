"""What tests of TensorFlow 1's layers ask the default graph for."""

from __future__ import annotations

from fastbn.compat import tf_layers as tf


def run_updates(key="update_ops"):
    updates = tf.get_collection(key)
    for update in updates:
        update()
    return len(updates)


def names(variables=None):
    return [v.name for v in (tf.global_variables() if variables is None else variables)]
