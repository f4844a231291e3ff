"""Old APIs on NumPy arrays, and weights in and out of other frameworks. Importing this loads NumPy only."""

from .flax import flax_arguments, from_flax, from_flax_many, to_flax
from .keras_weights import from_keras, from_keras_many, keras_config, to_keras
from .onnx import from_onnx, from_onnx_many, to_onnx
from .safetensors import load_safetensors, save_safetensors
from .tf1 import from_tf1, from_tf1_many
from .torch import from_torch, from_torch_many, to_torch, torch_arguments

__all__ = [
    "flax_arguments",
    "from_flax",
    "from_flax_many",
    "from_keras",
    "from_keras_many",
    "from_onnx",
    "from_onnx_many",
    "from_tf1",
    "from_tf1_many",
    "from_torch",
    "from_torch_many",
    "keras_config",
    "load_safetensors",
    "save_safetensors",
    "to_flax",
    "to_keras",
    "to_onnx",
    "to_torch",
    "torch_arguments",
]
