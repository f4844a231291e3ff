"""The primitives: the four loops through which every value of every array goes.

    reduce    first += u - p,   second += (u - p) * (v - q)
    apply     y = (u - p) * a + c          or, with a second operand,   ((u - p) + ((v - q) * b + c)) * a

each once along a run of one channel (``*_run``: p, q, a, b, c are scalars) and once along rows in which the channels
are neighbours (``*_rows``: they are arrays). With u = v = x and p a shift, *reduce* gives the moments; with u = dy,
v = x, p = 0 and q the mean it gives the sums of the gradient. With ``pair`` false the second operand is never read:
the argument is a constant wherever these functions are inlined, so the compiler drops the branch.

Sums are float64 and go into LANES virtual lanes, by a value's place in its run or its column: the order of additions is
that of the source at every instruction set level. Lanes are handled in packs (lanes.h). Plain loops over an array of
lanes were tried first: GCC 12 vectorized the sums, but walked across rows with gathers in *apply_rows* and left the sums
over two operands scalar (4 to 8 times slower).

*apply* loads a pack before it stores it, so that y may be u or v itself and no alias check is needed.
"""
from cython cimport floating


cdef extern from "lanes.h" nogil:
    ctypedef double vd "fastbn_vd"  # for Cython a number: its arithmetic is written as C arithmetic
    ctypedef float vf "fastbn_vf"
    enum:
        LANES "FASTBN_LANES"
        VD "FASTBN_VD"  # doubles in a pack
        VF "FASTBN_VF"
        ND "FASTBN_ND"  # packs of doubles in all lanes
        NF "FASTBN_NF"
    vd splat_d "fastbn_splat_d"(double x)
    vf splat_f "fastbn_splat_f"(float x)
    vd widen_f "fastbn_widen_f"(const float* x)
    vd widen_d "fastbn_widen_d"(const double* x)
    void stream_d "fastbn_stream_d"(double* y, vd z)
    void stream_f "fastbn_stream_f"(float* y, vf z)
    void fence "fastbn_fence"()
    void prefetch "fastbn_prefetch"(const void* x)
    const double[32] last_weights "fastbn_last"


ctypedef fused pack:
    vf
    vd


cdef inline vd widen(const floating* x) noexcept nogil:
    """A pack of doubles from values of either type."""
    if floating is float:
        return widen_f(x)
    else:
        return widen_d(x)


cdef inline void reduce_run(const floating* u, const floating* v, Py_ssize_t n, double p, double q, bint pair,
                            double* first, double* second) noexcept nogil:
    """Add a run of n >= LANES values of one channel to LANES pairs of sums.

    The last chunk overlaps the one before; values that were added already get weight 0.
    """
    cdef vd s[ND]
    cdef vd t[ND]
    cdef vd du
    cdef vd ps = splat_d(p)
    cdef vd qs = splat_d(q)
    cdef Py_ssize_t i, j, k, rest = n % LANES
    cdef const double* weight = last_weights + rest
    for j in range(ND):
        s[j] = (<vd*> first)[j]
        t[j] = (<vd*> second)[j]
    for k in range(n // LANES):
        i = k * LANES
        for j in range(ND):
            du = widen(u + i + j * VD) - ps
            s[j] = s[j] + du
            if pair:
                t[j] = t[j] + du * (widen(v + i + j * VD) - qs)
            else:
                t[j] = t[j] + du * du
    if rest:
        i = n - LANES
        for j in range(ND):
            du = (widen(u + i + j * VD) - ps) * (<vd*> weight)[j]
            s[j] = s[j] + du
            if pair:
                t[j] = t[j] + du * (widen(v + i + j * VD) - qs)
            else:
                t[j] = t[j] + du * du
    for j in range(ND):
        (<vd*> first)[j] = s[j]
        (<vd*> second)[j] = t[j]


cdef inline void reduce_rows(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv,
                             Py_ssize_t rows, Py_ssize_t width, const double* p, const double* q, bint pair,
                             double* first, double* second) noexcept nogil:
    """Add rows to one pair of sums per column; su and sv are the distances between rows in values.

    The width is a multiple of LANES.
    """
    cdef vd s[ND]
    cdef vd t[ND]
    cdef vd ps[ND]
    cdef vd qs[ND]
    cdef vd du
    cdef Py_ssize_t i, j, k, r
    for k in range(width // LANES):
        i = k * LANES
        for j in range(ND):
            s[j] = (<vd*> (first + i))[j]
            t[j] = (<vd*> (second + i))[j]
            ps[j] = (<vd*> (p + i))[j]
            qs[j] = (<vd*> (q + i))[j]
        for r in range(rows):
            # The same place in the next rows: several rows within a page are more than the processor's own
            # prefetching follows.
            prefetch(u + (rows + r) * su + i)
            if pair:
                prefetch(v + (rows + r) * sv + i)
            for j in range(ND):
                du = widen(u + r * su + i + j * VD) - ps[j]
                s[j] = s[j] + du
                if pair:
                    t[j] = t[j] + du * (widen(v + r * sv + i + j * VD) - qs[j])
                else:
                    t[j] = t[j] + du * du
        for j in range(ND):
            (<vd*> (first + i))[j] = s[j]
            (<vd*> (second + i))[j] = t[j]


cdef inline pack scaled(const pack* u, const pack* v, pack p, pack a, pack c, pack q, pack b, bint pair) noexcept nogil:
    """The formula of *apply*, the only place where it stands."""
    if pair:
        return ((u[0] - p) + ((v[0] - q) * b + c)) * a
    return (u[0] - p) * a + c


cdef inline void put(floating* y, pack z, bint stream) noexcept nogil:
    """Store a pack; past the caches only where y is aligned to packs."""
    if stream:
        if floating is float and pack is vf:
            stream_f(y, z)
        elif floating is double and pack is vd:
            stream_d(y, z)
    else:
        (<pack*> y)[0] = z


cdef inline void apply_packs(const floating* u, const floating* v, floating* y, Py_ssize_t n, pack p, pack a, pack c,
                             pack q, pack b, bint pair, bint stream, Py_ssize_t width) noexcept nogil:
    """n >= width values in packs of that width; the last pack overlaps, and is computed before anything is stored.

    With ``stream``, y shares no memory with u and v, and a first pack overlaps as well, up to where y is aligned.
    """
    cdef Py_ssize_t _k
    cdef Py_ssize_t i = 0
    cdef Py_ssize_t end = n - width
    cdef pack last = scaled(<const pack*> (u + end), <const pack*> (v + end), p, a, c, q, b, pair)
    if stream:
        i = (width - <Py_ssize_t> (<size_t> y // sizeof(floating) % <size_t> width)) % width
        (<pack*> y)[0] = scaled(<const pack*> u, <const pack*> v, p, a, c, q, b, pair)
    for _k in range((n - i) // width):
        put(y + i, scaled(<const pack*> (u + i), <const pack*> (v + i), p, a, c, q, b, pair), stream)
        i = i + width
    if i < n:
        (<pack*> (y + end))[0] = last


cdef inline void apply_run(const floating* u, const floating* v, floating* y, Py_ssize_t n, floating p, floating a,
                           floating c, floating q, floating b, bint pair, bint stream) noexcept nogil:
    """Scale and shift a run of n >= LANES values of one channel."""
    if floating is float:
        apply_packs[float, vf](u, v, y, n, splat_f(p), splat_f(a), splat_f(c), splat_f(q), splat_f(b), pair, stream,
                               VF)
    else:
        apply_packs[double, vd](u, v, y, n, splat_d(p), splat_d(a), splat_d(c), splat_d(q), splat_d(b), pair, stream,
                                VD)


cdef inline void apply_columns(const floating* u, const floating* v, floating* y, Py_ssize_t n, const floating* p,
                               const floating* a, const floating* c, const floating* q, const floating* b, bint pair,
                               bint stream, Py_ssize_t width, pack* typed) noexcept nogil:
    """One row, in packs of that width; typed only names the type."""
    cdef Py_ssize_t i = 0, _k
    for _k in range(n // width):
        put(y + i, scaled(<const pack*> (u + i), <const pack*> (v + i), (<const pack*> (p + i))[0],
                          (<const pack*> (a + i))[0], (<const pack*> (c + i))[0], (<const pack*> (q + i))[0],
                          (<const pack*> (b + i))[0], pair), stream)
        i = i + width


cdef inline void apply_rows(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, floating* y,
                            Py_ssize_t sy, Py_ssize_t rows, Py_ssize_t width, const floating* p, const floating* a,
                            const floating* c, const floating* q, const floating* b, bint pair,
                            bint stream) noexcept nogil:
    """Scale and shift rows with one set of coefficients per column; the width is a multiple of LANES.

    With ``stream``, every row of y is aligned to LANES values, and shares no memory with u and v.
    """
    cdef Py_ssize_t r
    for r in range(rows):
        if floating is float:
            apply_columns(u + r * su, v + r * sv, y + r * sy, width, p, a, c, q, b, pair, stream, VF, <vf*> NULL)
        else:
            apply_columns(u + r * su, v + r * sv, y + r * sy, width, p, a, c, q, b, pair, stream, VD, <vd*> NULL)
