"""The real batch norm of TensorFlow 1, asked from another process: requests on stdin, replies on stdout.

Runs with TensorFlow 1.13 to 1.15 (``tf.layers``, ``tf.contrib``) and with TensorFlow 2 (``tf.compat.v1.layers`` of
tf_keras, and tf_slim), so its syntax is that of Python 3.7. It knows nothing of fastbn. Arrays travel as bytes, since
the two sides may have different NumPys.
"""

import os
import pickle
import struct
import sys

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np


def pack(value):
    if isinstance(value, (np.ndarray, np.generic)):
        value = np.asarray(value)
        return ("array", value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, dict):
        return ("dict", [(k, pack(v)) for k, v in value.items()])
    if isinstance(value, (list, tuple)):
        return ("list", [pack(v) for v in value])
    return ("plain", value)


def unpack(value):
    kind = value[0]
    if kind == "array":
        return np.frombuffer(value[3], value[1]).reshape(value[2]).copy()
    if kind == "dict":
        return {k: unpack(v) for k, v in value[1]}
    if kind == "list":
        return [unpack(v) for v in value[1]]
    return value[1]


def send(stream, value):
    data = pickle.dumps(pack(value), protocol=4)
    stream.write(struct.pack("<q", len(data)) + data)
    stream.flush()


def receive(stream):
    head = stream.read(8)
    if len(head) < 8:
        return None
    (size,) = struct.unpack("<q", head)
    return unpack(pickle.loads(stream.read(size)))


def load():
    """Return TensorFlow with the API of version 1, and contrib's batch_norm."""
    import warnings

    warnings.filterwarnings("ignore")
    import tensorflow

    if tensorflow.__version__.startswith("1."):
        tensorflow.compat.v1.logging.set_verbosity(tensorflow.compat.v1.logging.ERROR)
        from tensorflow.contrib.layers import batch_norm

        return tensorflow, batch_norm
    # tf_slim was written for TensorFlow 2.3: some names have moved since.
    import tf_keras.src.legacy_tf_layers.normalization as moved

    sys.modules["tf_keras.legacy_tf_layers.normalization"] = moved
    sys.modules["tf_keras.legacy_tf_layers"] = sys.modules["tf_keras.src.legacy_tf_layers"]
    from tensorflow.python.framework import ops, tensor
    from tensorflow.python.ops import cond, control_flow_ops

    ops.Tensor = tensor.Tensor
    control_flow_ops.cond = cond.cond
    import tf_slim

    tf = tensorflow.compat.v1
    tf.logging.set_verbosity(tf.logging.ERROR)
    return tf, tf_slim.layers.batch_norm


def answer(tf, contrib, request):
    """Build training and inference with shared variables, run the steps, return everything there is to see."""
    graph = tf.Graph()
    with graph.as_default():
        kwargs = dict(request["kwargs"])
        if request.get("adjustment") is not None:
            scale, bias = (v.astype(np.float32) for v in request["adjustment"])
            kwargs["adjustment"] = lambda shape: (tf.constant(scale), tf.constant(bias))
        if kwargs.get("updates_collections") == tf.GraphKeys.UPDATE_OPS:
            kwargs["updates_collections"] = tf.GraphKeys.UPDATE_OPS  # contrib compares by identity
        shape = list(request["batches"][0][0].shape)
        x = tf.placeholder(tf.float32, shape)
        dy = tf.placeholder(tf.float32, shape)
        weights = None
        if request.get("weights") is not None:
            weights = tf.placeholder(tf.float32, shape[:1])
            kwargs["batch_weights"] = weights

        def call(training, **more):
            if request["api"] == "layers":
                return tf.layers.batch_normalization(x, training=training, **dict(kwargs, **more))
            return contrib(x, is_training=training, **dict(kwargs, **more))

        named = "name" if request["api"] == "layers" else "scope"
        prefix = "".join(scope + "/" for scope in request["scopes"])
        contexts = [tf.variable_scope(scope) for scope in request["scopes"]]
        for context in contexts:
            context.__enter__()
        for _ in range(request.get("before", 0)):  # layers that take names
            call(True)
        before = len(tf.global_variables())
        outputs = [call(True)]
        variables = tf.global_variables()[before:]
        own = variables[0].name[: -len(":0")].rpartition("/")[0]
        outputs.append(call(False, **{named: own[len(prefix) :], "reuse": True}))
        for context in reversed(contexts):
            context.__exit__(None, None, None)

        key = kwargs.get("updates_collections", "update_ops")
        updates = [u for u in tf.get_collection(key or "none") if u.name.startswith(own + "/")]
        parameters = [v for v in variables if v.name in (own + "/gamma:0", own + "/beta:0")]
        gradients = [tf.gradients(y, [x, *parameters], dy) for y in outputs]
        reply = {
            "variables": [[v.name, list(v.shape.as_list())] for v in variables],
            "trainable": [v.name for v in tf.trainable_variables()],
            "global": [v.name for v in tf.global_variables()],
            "updates": [u.name for u in updates],
            "steps": [],
        }
        with tf.Session() as session:
            session.run(tf.global_variables_initializer())
            for variable in variables:
                value = request["values"].get(variable.name.rpartition("/")[2][: -len(":0")])
                if value is not None:
                    variable.load(value.reshape(variable.shape.as_list()).astype(np.float32), session)
            for step, (batch, upstream) in enumerate(request["batches"]):
                feed = {x: batch, dy: upstream}
                if weights is not None:
                    feed[weights] = request["weights"][step]
                training = step < len(request["batches"]) - 1  # the last one is inference
                chosen = 0 if training else 1
                y, found = session.run([outputs[chosen], gradients[chosen]], feed)
                if training and updates:
                    session.run(updates, feed)
                reply["steps"].append(
                    {
                        "y": y,
                        "dx": found[0],
                        "grads": {p.name.rpartition("/")[2][: -len(":0")]: g for p, g in zip(parameters, found[1:])},
                        "values": {v.name: value for v, value in zip(variables, session.run(variables))},
                    }
                )
    return reply


def run_program(tf, contrib, program):
    """Carry out steps that make names; stop at the first that is refused."""
    graph, stack = tf.Graph(), []
    reply = {"failed": None, "scopes": [], "layers": []}
    with graph.as_default():
        x = tf.placeholder(tf.float32, [4, 3])
        for number, (what, name, reuse) in enumerate(program):
            reuse = tf.AUTO_REUSE if reuse == "auto" else reuse
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
                    tf.layers.batch_normalization(x, training=True, name=name, reuse=reuse)
                elif what == "contrib":
                    contrib(x, scope=name, reuse=reuse)
                elif what == "object":
                    layer = tf.layers.BatchNormalization(name=name)
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


def main():
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what TensorFlow prints
    try:
        tf, contrib = load()
        import tensorflow

        send(replies, {"version": tensorflow.__version__})
    except Exception as error:
        send(replies, {"missing": str(error)})
        return
    while True:
        request = receive(sys.stdin.buffer)
        if request is None:
            return
        try:
            if "program" in request:
                send(replies, run_program(tf, contrib, request["program"]))
            else:
                send(replies, answer(tf, contrib, request))
        except Exception as error:
            import traceback

            send(replies, {"error": type(error).__name__ + ": " + str(error) + "\n" + traceback.format_exc()})


if __name__ == "__main__":
    main()
