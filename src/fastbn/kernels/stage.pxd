"""Loads and stores for what is not contiguous: a tile of it is copied to a buffer in L1, padded to whole lanes."""
from cython cimport floating

from .lanes cimport LANES


cdef inline Py_ssize_t whole(Py_ssize_t n) noexcept nogil:
    """n rounded up to whole lanes."""
    return (n + LANES - 1) // LANES * LANES


cdef inline void gather(const floating* x, Py_ssize_t stride, Py_ssize_t n, floating pad, floating* tile) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        tile[i] = x[i * stride]
    for i in range(n, whole(n)):
        tile[i] = pad


cdef inline void scatter(const floating* tile, Py_ssize_t n, floating* y, Py_ssize_t stride) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        y[i * stride] = tile[i]
