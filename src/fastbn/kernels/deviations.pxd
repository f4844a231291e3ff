"""1 / sqrt(variance + epsilon) of channels."""
from cython cimport floating
from libc.math cimport sqrt

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    /* 1 / sqrt(s) for numbers in range, without a root or a division, which take the time of all else that is done for a
     * channel: halving the exponent is within 3.5 %, a step whose numbers are best for all that may come out of it within
     * 6.6e-4, and two of Newton's within 6.1e-13, a hundred thousandth of what float32 keeps. */
    static inline double fastbn_reciprocal_root(double s) {
        uint64_t bits;
        double y;
        memcpy(&bits, &s, sizeof bits);
        bits = 0x5fe4167300000000u - (bits >> 1);
        memcpy(&y, &bits, sizeof y);
        y *= 1.6757926 - 0.69629367 * s * y * y;
        s *= 0.5;
        y *= 1.5 - s * y * y;
        y *= 1.5 - s * y * y;
        return y;
    }
    static inline int fastbn_has_root(double s) {
        return s >= 1e-300 && s <= 1e300;
    }
    """
    double reciprocal_root "fastbn_reciprocal_root"(double s) noexcept nogil
    bint has_root "fastbn_has_root"(double s) noexcept nogil


cdef inline double reciprocal_deviation(double variance, double epsilon) noexcept nogil:
    """1 / sqrt(variance + epsilon); 0 where both are 0, so that a constant channel gives beta with any epsilon."""
    cdef double s = variance + epsilon
    return 0.0 if s == 0 else 1 / sqrt(s)


cdef inline void reciprocal_deviations(const floating* variance, double epsilon, Py_ssize_t n, bint narrow,
                                       double* found) noexcept nogil:
    """`reciprocal_deviation` of n channels.

    Where only what float32 keeps of them is wanted, they may be off by 6.1e-13 of themselves.
    """
    cdef Py_ssize_t i
    cdef double s
    cdef bint all_have = narrow
    if narrow:
        for i in range(n):
            s = variance[i] + epsilon
            found[i] = reciprocal_root(s)
            all_have &= has_root(s)
    if all_have:
        return
    for i in range(n):  # which of the two a channel gets depends on its own variance alone
        if not (narrow and has_root(variance[i] + epsilon)):
            found[i] = reciprocal_deviation(variance[i], epsilon)
