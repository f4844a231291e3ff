"""The three modes of a batch norm, and the tables by which each framework gets to one of them.

=============  ====================  =========================  ==============================
mode           normalizes with       writes moving statistics   gradient of x
=============  ====================  =========================  ==============================
``train``      this batch            yes                        through the batch statistics
``batch``      this batch            no                         through the batch statistics
``inference``  moving statistics     no                         scale only
=============  ====================  =========================  ==============================
"""

from __future__ import annotations

from typing import Final, Literal

Mode = Literal["train", "batch", "inference"]

# Each table maps the two flags of a framework to a mode.

# (training, trainable). A frozen layer infers.
KERAS: Final[dict[tuple[bool, bool], Mode]] = {
    (True, True): "train",
    (True, False): "inference",
    (False, True): "inference",
    (False, False): "inference",
}

# (training, trainable) of tf.layers: a frozen layer still normalizes with the batch, but does not update.
TF_LAYERS: Final[dict[tuple[bool, bool], Mode]] = {
    (True, True): "train",
    (True, False): "batch",
    (False, True): "inference",
    (False, False): "inference",
}

# (is_training, trainable) of tf.contrib.layers: is_training decides alone.
TF_CONTRIB: Final[dict[tuple[bool, bool], Mode]] = {
    (True, True): "train",
    (True, False): "train",
    (False, True): "inference",
    (False, False): "inference",
}

# (training, tracks running statistics) of PyTorch: without statistics there is nothing else than the batch.
TORCH: Final[dict[tuple[bool, bool], Mode]] = {
    (True, True): "train",
    (True, False): "batch",
    (False, True): "inference",
    (False, False): "batch",
}


def functional_mode(training: bool, update: bool) -> Mode:
    """Return the mode of a call of `fastbn.batch_norm`."""
    if not training:
        return "inference"
    return "train" if update else "batch"
