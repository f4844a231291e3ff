from typing import Any

from numpy.typing import NDArray

def empty_like(x: NDArray[Any]) -> NDArray[Any]: ...
