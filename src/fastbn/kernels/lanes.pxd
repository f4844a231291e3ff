"""The primitives: the four loops through which every value of every array goes.

    reduce    first += u - p,   second += (u - p) * (v - q)
    apply     y = (u - p) * a + c          or, with a second operand,   (u - p) * a + ((v - q) * b + c)

each once along a run of one channel (``*_run``: p, q, a, b, c are scalars) and once along rows in which the channels
are neighbours (``*_rows``: they are arrays). With u = v = x and p a shift, *reduce* gives the moments; with u = dy,
v = x, p = 0 and q the mean it gives the sums of the gradient. With ``pair`` false the second operand is never read:
the argument is a constant wherever these functions are inlined, so the compiler drops the branch.

Sums are float64 and go into LANES virtual lanes, a small local array with an inner loop of constant trip count: GCC and
Clang turn that into vector code without any floating point flag, and the order of additions is that of the source at
every instruction set level. *apply* loads a whole chunk before it stores it, so that y may be u or v itself and no alias
check is needed. All lengths and widths are multiples of LANES: the drivers stage what is left over.
"""
from cython cimport floating

cdef enum:
    # 16 doubles for each of two sums fill half of the vector registers at AVX2: more would spill, fewer would wait
    # for the latency of the additions.
    LANES = 16


cdef inline void reduce_run(const floating* u, const floating* v, Py_ssize_t n, double p, double q, bint pair,
                            double* first, double* second) noexcept nogil:
    """Add n values of one channel to LANES pairs of sums."""
    cdef double s[LANES]
    cdef double t[LANES]
    cdef double du
    cdef Py_ssize_t i, j, k
    for j in range(LANES):
        s[j] = first[j]
        t[j] = second[j]
    for k in range(n // LANES):
        i = k * LANES
        if pair:
            for j in range(LANES):
                du = <double> u[i + j] - p
                s[j] += du
                t[j] += du * (<double> v[i + j] - q)
        else:
            for j in range(LANES):
                du = <double> u[i + j] - p
                s[j] += du
                t[j] += du * du
    for j in range(LANES):
        first[j] = s[j]
        second[j] = t[j]


cdef inline void reduce_rows(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv,
                             Py_ssize_t rows, Py_ssize_t width, const double* p, const double* q, bint pair,
                             double* first, double* second) noexcept nogil:
    """Add rows to one pair of sums per column; su and sv are the distances between rows in values."""
    cdef double s[LANES]
    cdef double t[LANES]
    cdef double du
    cdef Py_ssize_t i, j, k, r
    for k in range(width // LANES):
        i = k * LANES
        for j in range(LANES):
            s[j] = first[i + j]
            t[j] = second[i + j]
        for r in range(rows):
            if pair:
                for j in range(LANES):
                    du = <double> u[r * su + i + j] - p[i + j]
                    s[j] += du
                    t[j] += du * (<double> v[r * sv + i + j] - q[i + j])
            else:
                for j in range(LANES):
                    du = <double> u[r * su + i + j] - p[i + j]
                    s[j] += du
                    t[j] += du * du
        for j in range(LANES):
            first[i + j] = s[j]
            second[i + j] = t[j]


cdef inline void apply_run(const floating* u, const floating* v, floating* y, Py_ssize_t n, floating p, floating a,
                           floating c, floating q, floating b, bint pair) noexcept nogil:
    """Scale and shift n values of one channel."""
    cdef floating z[LANES]
    cdef Py_ssize_t i, j, k
    for k in range(n // LANES):
        i = k * LANES
        if pair:
            for j in range(LANES):
                z[j] = (u[i + j] - p) * a + ((v[i + j] - q) * b + c)
        else:
            for j in range(LANES):
                z[j] = (u[i + j] - p) * a + c
        for j in range(LANES):
            y[i + j] = z[j]


cdef inline void apply_rows(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, floating* y,
                            Py_ssize_t sy, Py_ssize_t rows, Py_ssize_t width, const floating* p, const floating* a,
                            const floating* c, const floating* q, const floating* b, bint pair) noexcept nogil:
    """Scale and shift rows with one set of coefficients per column."""
    cdef floating z[LANES]
    cdef Py_ssize_t i, j, k, r
    for k in range(width // LANES):
        i = k * LANES
        for r in range(rows):
            if pair:
                for j in range(LANES):
                    z[j] = ((u[r * su + i + j] - p[i + j]) * a[i + j]
                            + ((v[r * sv + i + j] - q[i + j]) * b[i + j] + c[i + j]))
            else:
                for j in range(LANES):
                    z[j] = (u[r * su + i + j] - p[i + j]) * a[i + j] + c[i + j]
            for j in range(LANES):
                y[r * sy + i + j] = z[j]
