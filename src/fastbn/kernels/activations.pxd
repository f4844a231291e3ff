"""Activations and their derivatives, of packs.

They are adds, multiplies, comparisons and bits, never a function of the C library: so they too give the same bits at every
level.
"""
from .packs cimport pack, power, select, series, smaller, splat, vf


cdef inline pack exponential(pack x) noexcept nogil:
    """exp(x) of x <= 0, within 2 units in the last place; NaN stays.

    x = n ln 2 + r with |r| <= ln 2 / 2, and ln 2 in two parts, of which n times the first is exact. 2^n comes as two
    factors, so that results below the normal numbers are rounded once. Below the limit the result is 0 in any case.
    """
    cdef Py_ssize_t i
    cdef Py_ssize_t begin = 6 if pack is vf else 0
    cdef pack rounder = splat(12582912.0 if pack is vf else 6755399441055744.0, x)
    cdef pack limit = splat(-104.0 if pack is vf else -746.0, x)
    cdef pack n, r, half
    cdef pack s = splat(series[begin], x)
    x = select(x, limit, limit, x)
    n = (x * splat(1.4426950408889634, x) + rounder) - rounder
    r = x - n * splat(0.693359375 if pack is vf else 0.69314718036912382, x)
    r = r - n * splat(-2.1219444005469058e-4 if pack is vf else 1.9082149292705877e-10, x)
    for i in range(begin + 1, 12):
        s = s * r + splat(series[i], x)
    s = (s * (r * r) + r) + splat(1, x)
    half = (n * splat(0.5, x) + rounder) - rounder
    return (s * power(half + rounder)) * power((n - half) + rounder)


cdef inline pack clipped(pack z, pack lo, pack hi, pack dy, bint gate) noexcept nogil:
    """A value, or a gradient times the derivative there; z may then be the value itself. NaN stays."""
    cdef pack zero = splat(0, z)
    if gate:
        return select(hi, z, zero, select(z, lo, zero, dy))  # not times 0: dy may be infinite
    return smaller(hi, select(z, lo, lo, z))


cdef inline pack bent(pack z, pack slope, pack dy, bint gate) noexcept nogil:
    """The same."""
    return select(z, splat(0, z), (dy if gate else z) * slope, dy if gate else z)


cdef inline pack smooth(pack z, pack k1, pack k3, pack dy, bint gate) noexcept nogil:
    """The same. exp is never asked for more than 1, and what is beyond the edge is 0 or z in float64 too."""
    cdef pack zero = splat(0, z)
    cdef pack one = splat(1, z)
    cdef pack edge = splat(1000, z)
    cdef pack low = select(z, -edge, -edge, z)  # -inf times 0 would be NaN
    cdef pack x = select(edge, low, edge, low)
    cdef pack square = x * x
    cdef pack t = x * (k1 + k3 * square)
    cdef pack e = exponential(select(zero, t, -t, t))
    cdef pack inverse = one / (one + e)
    cdef pack sigmoid = select(t, zero, e, one) * inverse
    if gate:
        return dy * (sigmoid + (x * (k1 + (splat(3, z) * k3) * square)) * (e * (inverse * inverse)))
    return low * sigmoid
