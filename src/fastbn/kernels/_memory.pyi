from typing import Any

import numpy as np
from numpy.typing import NDArray

def empty_like(x: NDArray[Any], dtype: np.dtype[Any] | None = None) -> NDArray[Any]: ...
