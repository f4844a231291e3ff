"""Activations and their derivatives, of packs.

They are adds, multiplies, comparisons and bits, never a function of the C library: so they too give the same bits at every
level.
"""
from .packs cimport begins_with_zero, larger, minus_size, pack, select, series, smaller, splat, times_power, vf


cdef enum:
    SIDE = 8  # packs at most of a smooth activation, whose chains of operations are carried out side by side


cdef inline void exponentials(pack* x, Py_ssize_t count) noexcept nogil:
    """exp(x) of x <= 0, within 2 units in the last place, in the place of x; of NaN it is 0.

    x = n ln 2 + r with |r| <= ln 2 / 2, and ln 2 in two parts, of which n times the first is exact. The result is rounded
    once, also below the normal numbers. Below the limit it is 0 in any case.
    """
    cdef Py_ssize_t i, j
    cdef Py_ssize_t begin = 12 if pack is vf else 0, end = 17 if pack is vf else 12
    cdef pack rounder = splat(12582912.0 if pack is vf else 6755399441055744.0, x[0])
    cdef pack limit = splat(-104.0 if pack is vf else -746.0, x[0])
    cdef pack high = splat(0.693359375 if pack is vf else 0.69314718036912382, x[0])
    cdef pack low = splat(-2.1219444005469058e-4 if pack is vf else 1.9082149292705877e-10, x[0])
    cdef pack one = splat(1, x[0])
    cdef pack n[SIDE]
    cdef pack s[SIDE]
    for i in range(count):
        x[i] = larger(x[i], limit)
        n[i] = (x[i] * splat(1.4426950408889634, x[0]) + rounder) - rounder
    for i in range(count):
        x[i] = x[i] - n[i] * high
    for i in range(count):
        x[i] = x[i] - n[i] * low
        s[i] = splat(series[begin], x[0])
    for j in range(begin + 1, end):
        for i in range(count):
            s[i] = s[i] * x[i] + splat(series[j], x[0])
    for i in range(count):
        s[i] = (s[i] * (x[i] * x[i]) + x[i]) + one
    for i in range(count):
        x[i] = times_power(s[i], n[i])


cdef inline pack clipped(pack z, pack lo, pack hi, pack dy, bint gate) noexcept nogil:
    """A value, or a gradient times the derivative there; z may then be the value itself. NaN stays."""
    cdef pack zero = splat(0, z)
    if gate:
        return select(hi, z, zero, select(z, lo, zero, dy))  # not times 0: dy may be infinite
    return smaller(hi, select(z, lo, lo, z))


cdef inline pack bent(pack z, pack slope, pack dy, bint gate) noexcept nogil:
    """The same."""
    return select(z, splat(0, z), (dy if gate else z) * slope, dy if gate else z)


cdef inline void smooth(pack* z, const pack* dy, Py_ssize_t count, pack k1, pack k3, bint gate) noexcept nogil:
    """The same of some packs, in the place of z: each is a chain of operations too long for a processor to look beyond."""
    if begins_with_zero(&k3):  # silu; the same bits as below
        smooth_as(z, dy, count, k1, k3, gate, False)
    else:
        smooth_as(z, dy, count, k1, k3, gate, True)


cdef inline void smooth_as(pack* z, const pack* dy, Py_ssize_t count, pack k1, pack k3, bint gate, bint cubic) noexcept nogil:
    """The same, with k3 or without.

    exp is never asked for more than 1, and what is beyond the edge is 0 or z in float64 too.
    """
    cdef Py_ssize_t i
    cdef pack zero = splat(0, k1)
    cdef pack one = splat(1, k1)
    cdef pack edge = splat(1000, k1)
    cdef pack x[SIDE]
    cdef pack square[SIDE]
    cdef pack t[SIDE]
    cdef pack e[SIDE]
    cdef pack inverse[SIDE]
    for i in range(count):
        z[i] = larger(-edge, z[i])  # -inf times 0 would be NaN
        x[i] = smaller(edge, z[i])
        if cubic:
            square[i] = x[i] * x[i]
    for i in range(count):
        t[i] = x[i] * (k1 + k3 * square[i] if cubic else k1)
        e[i] = minus_size(t[i])
    exponentials(e, count)
    for i in range(count):
        inverse[i] = one / (one + e[i])
    for i in range(count):
        e[i] = e[i] * inverse[i]
        if gate:
            x[i] = x[i] * (k1 + (splat(3, k1) * k3) * square[i]) if cubic else t[i]
        t[i] = select(t[i], zero, e[i], inverse[i])  # the sigmoid
    for i in range(count):
        if gate:
            z[i] = dy[i] * (t[i] + x[i] * (e[i] * inverse[i]))
        else:
            z[i] = z[i] * t[i]
