"""Between the types of data and those of arithmetic: a run, or a column of some rows, in and out."""
from cython cimport floating
from libc.string cimport memcpy

from .job cimport Operand
from .kinds cimport DOUBLE

cdef extern from "convert.h" nogil:
    void load_small "fastbn_load"(int kind, const char* x, Py_ssize_t sx, Py_ssize_t n, float* y, Py_ssize_t sy)
    void store_small "fastbn_store"(int kind, const float* x, Py_ssize_t sx, Py_ssize_t n, char* y, Py_ssize_t sy)


cdef inline bint is_native(const Operand* operand) noexcept nogil:
    """Whether arithmetic is done in the type of the data, so that they need no conversion."""
    return operand.kind <= DOUBLE


cdef inline void take(const Operand* operand, const char* x, Py_ssize_t sx, Py_ssize_t n, floating* y,
                      Py_ssize_t sy) noexcept nogil:
    """n values of an operand, sx bytes apart, to y, sy values apart."""
    cdef Py_ssize_t i
    if is_native(operand) and sx == sizeof(floating) and sy == 1:
        memcpy(y, x, n * sizeof(floating))
    elif is_native(operand):
        for i in range(n):
            y[i * sy] = (<const floating*> (x + i * sx))[0]
    elif floating is float:
        load_small(operand.kind, x, sx, n, y, sy)


cdef inline void give(const Operand* operand, const floating* x, Py_ssize_t sx, Py_ssize_t n, char* y,
                      Py_ssize_t sy) noexcept nogil:
    """n values of x, sx values apart, to an operand, sy bytes apart."""
    cdef Py_ssize_t i
    if is_native(operand) and sy == sizeof(floating) and sx == 1:
        memcpy(y, x, n * sizeof(floating))
    elif is_native(operand):
        for i in range(n):
            (<floating*> (y + i * sy))[0] = x[i * sx]
    elif floating is float:
        store_small(operand.kind, x, sx, n, y, sy)
