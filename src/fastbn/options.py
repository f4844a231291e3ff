"""What a layer does beyond the plain batch norm: its arguments, checked, and the objects that carry them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import checks, ghost
from . import layout as layouts
from .errors import must
from .renorm import SCHEMES, Renorm, clipping

Array = NDArray[Any]
Adjustment = Callable[[tuple[int, ...]], Any]

ON_NONFINITE: Final = ("propagate", "raise", "skip")


class Options(NamedTuple):
    """Checked arguments of a layer, fixed when it is made."""

    zero_debias: bool | str
    track: bool
    on_nonfinite: str
    renorm: bool
    renorm_clipping: dict[str, float] | None
    renorm_momentum: float
    renorm_scheme: str
    virtual_batch_size: int | None
    virtual_groups: str
    allow_incomplete: bool
    adjustment: Adjustment | None

    @property
    def plain(self) -> bool:
        """Whether a training call is one pass, followed by the update of two moving averages."""
        features = (self.zero_debias, self.renorm, self.virtual_batch_size, self.adjustment)
        return self.track and self.on_nonfinite == "propagate" and not any(features)

    def renormalizer(self) -> Renorm | None:
        """Return what renormalizes, if anything does."""
        if not self.renorm:
            return None
        return Renorm(self.renorm_scheme, self.renorm_momentum, self.renorm_clipping)

    def groups(self, x: Array, axis: Any, layout: str | None) -> list[slice] | None:
        """Return the groups of a training batch; None for one that is normalized as a whole."""
        if self.virtual_batch_size is None:
            return None
        if 0 in layouts.channel_axes(axis, layout, x.ndim):
            raise ValueError(must("axis", "not be the first axis of x with virtual_batch_size", repr(axis)))
        return ghost.groups(len(x), self.virtual_batch_size, self.virtual_groups, self.allow_incomplete)

    def adjusted(self, x: Array, axis: Any, layout: str | None) -> tuple[Array, Array] | None:
        """Return scale and shift of x_hat in a training call, flat."""
        if self.adjustment is None:
            return None
        axes = layouts.channel_axes(axis, layout, x.ndim)
        result = self.adjustment(x.shape)
        if not isinstance(result, tuple | list) or len(result) != 2:
            raise TypeError(must("adjustment", "return a tuple of scale and shift", type(result).__name__))
        scale, shift = result
        return _per_channel(scale, "scale", 1.0, x, axes), _per_channel(shift, "shift", 0.0, x, axes)


def _per_channel(value: Any, name: str, default: float, x: Array, axes: tuple[int, ...]) -> Array:
    """Return one number per channel from a scalar, an array of the channels, or one that broadcasts along x."""
    shape = layouts.channel_shape(x.shape, axes)
    array = checks.as_array(default if value is None else value, f"{name} of adjustment")
    if array.dtype.kind not in "iuf":
        raise TypeError(must(f"{name} of adjustment", "be real numbers", array.dtype))
    kept = tuple(n if a in axes else 1 for a, n in enumerate(x.shape))
    if array.ndim == x.ndim and array.shape == kept != shape:  # channel axes in the order of x
        array = array.transpose(*axes, *(a for a in range(x.ndim) if a not in axes)).reshape(shape)
    if array.shape not in ((), shape):
        raise ValueError(must(f"{name} of adjustment", f"have shape {shape}", array.shape))
    return np.broadcast_to(array, shape).reshape(-1).astype(np.float64)


def checked(
    *,
    ddof: int,
    zero_debias: Any,
    track: Any,
    on_nonfinite: Any,
    renorm: Any,
    renorm_clipping: Any,
    renorm_momentum: Any,
    renorm_scheme: Any,
    virtual_batch_size: Any,
    virtual_groups: Any,
    allow_incomplete: Any,
    adjustment: Any,
) -> Options:
    """Return the options of a layer, or raise."""
    size = None if virtual_batch_size is None else checks.count(virtual_batch_size, "virtual_batch_size")
    options = Options(
        zero_debias="mean" if isinstance(zero_debias, str) else checks.flag(zero_debias, "zero_debias"),
        track=checks.flag(track, "track"),
        on_nonfinite=checks.one_of(on_nonfinite, "on_nonfinite", ON_NONFINITE),
        renorm=checks.flag(renorm, "renorm"),
        renorm_clipping=clipping(renorm_clipping),
        renorm_momentum=checks.real(renorm_momentum, "renorm_momentum", 0.0, 1.0, "in [0, 1]"),
        renorm_scheme=checks.one_of(renorm_scheme, "renorm_scheme", SCHEMES),
        virtual_batch_size=size,
        virtual_groups=checks.one_of(virtual_groups, "virtual_groups", ghost.KINDS),
        allow_incomplete=checks.flag(allow_incomplete, "allow_incomplete"),
        adjustment=adjustment,
    )
    if isinstance(zero_debias, str) and zero_debias != "mean":
        raise ValueError(must("zero_debias", 'be a bool or "mean"', repr(zero_debias)))
    if options.virtual_batch_size == 0:
        raise ValueError(must("virtual_batch_size", "be at least 1", 0))
    if adjustment is not None and not callable(adjustment):
        raise TypeError(must("adjustment", "be callable or None", repr(adjustment)))
    if options.renorm:
        needed = (("zero_debias", zero_debias, False), ("track", options.track, True), ("ddof", ddof, 0))
        for name, value, wanted in needed:
            if value != wanted:
                raise ValueError(must(name, f"be {wanted} with renorm", repr(value)))
    return options
