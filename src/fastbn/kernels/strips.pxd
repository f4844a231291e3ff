"""What *apply* (lanes.pxd) computes, and on what."""
from .kinds cimport size_of


cdef enum Bend:
    STRAIGHT  # no activation
    CLIPPED   # between lo and hi; numbers: lo, 0 or NaN, and hi, positive or NaN: NaN is no bound
    BENT      # times a slope where not positive; numbers: slope
    SMOOTH    # z * sigmoid(k1 z + k3 z^3); numbers: k1, k3
    # None, but the gradient where x counts by w (1 without), or is missing; numbers: 0 if NaN is missing, else 1, and what w
    # is at most if it is given as bytes:
    WEIGHTED
    PRESENT   # the same where the statistics were constants


cdef struct Form:
    # What *apply* computes; see `scaled`.
    bint pair     # reads v
    bint third    # reads w
    int bend
    double[3] numbers


cdef enum Third:
    # What w is where a loop is compiled:
    NO_THIRD
    EACH       # a value beside each,
    ONE        # or of weights one for a row,
    BYTES      # or a byte beside each


cdef struct Loop:
    # What is constant where a loop is compiled: the kinds of values, and what it computes.
    int kind_u    # of u,
    int kind      # and of all others
    bint pair
    int third
    int bend
    bint stream   # y is stored past the caches


cdef struct Strips:
    # Operands and result of *apply*: runs or rows, so many of so many values, and bytes from each to the next.
    const char* u
    const char* v
    const char* w
    char* y
    Py_ssize_t su
    Py_ssize_t sv
    Py_ssize_t sw
    Py_ssize_t sy
    Py_ssize_t count
    Py_ssize_t length
    int kind_u  # of values of u: see `strips_of_kind`,
    int kind    # and of all others
    int third   # what w is, of weights of rows


cdef inline Py_ssize_t of_u(Py_ssize_t bytes, int kind_u, int kind) noexcept nogil:
    """Bytes of u, where there are so many of all others."""
    return bytes if kind_u == kind else bytes // size_of(kind) * size_of(kind_u)


cdef inline Py_ssize_t of_w(Py_ssize_t bytes, int third, int kind) noexcept nogil:
    """Bytes of w, likewise."""
    return 0 if third == ONE else bytes // size_of(kind) if third == BYTES else bytes


cdef inline Strips moved(const Strips* x, Py_ssize_t strips, Py_ssize_t bytes, int kind_u, int kind) noexcept nogil:
    """What begins so many strips and bytes later."""
    cdef Strips z = x[0]
    z.u += strips * x.su + of_u(bytes, kind_u, kind)
    z.v += strips * x.sv + bytes
    z.w += strips * x.sw + of_w(bytes, x.third, kind)
    z.y += strips * x.sy + bytes
    return z


cdef inline bint is_weighted(int bend) noexcept nogil:
    """Whether it is a gradient of values that do not all count alike; the third operand, if there is one, are weights then."""
    return bend == WEIGHTED or bend == PRESENT
