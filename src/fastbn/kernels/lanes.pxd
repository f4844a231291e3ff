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
from libc.stdint cimport int64_t


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
    vd add_exact_product "fastbn_add_exact_product"(vd t, vd x, vd y)
    void stream_d "fastbn_stream_d"(double* y, vd z)
    void stream_f "fastbn_stream_f"(float* y, vf z)
    void fence "fastbn_fence"()
    void prefetch "fastbn_prefetch"(const void* x)
    vd masked "fastbn_masked"(vd x, const int64_t* mask)
    const int64_t[32] last_masks "fastbn_last"


ctypedef fused pack:
    vf
    vd


cdef inline vd widen(const floating* x) noexcept nogil:
    """A pack of doubles from values of either type."""
    if floating is float:
        return widen_f(x)
    else:
        return widen_d(x)


cdef inline void add_pack(vd* s, vd* t, vd du, vd dv, bint shifted) noexcept nogil:
    """The formula of *reduce*, the only place where it stands; du and dv are relative to their shifts already."""
    s[0] = s[0] + du
    if shifted:
        t[0] = t[0] + du * dv
    else:
        t[0] = add_exact_product(t[0], du, dv)


cdef inline vd relative(const floating* x, vd shift, bint shifted) noexcept nogil:
    if shifted:
        return widen(x) - shift
    return widen(x)


cdef inline void reduce_run(const floating* u, const floating* v, Py_ssize_t n, double p, double q, bint pair,
                            bint shifted, Py_ssize_t next_u, Py_ssize_t next_v, double* first,
                            double* second) noexcept nogil:
    """Add a run of n >= LANES values of one channel to LANES pairs of sums.

    The run that comes next, so many values further on, is fetched meanwhile: the processor's own prefetching would
    start anew with every run.
    The last chunk overlaps the one before; values that were added already are masked.
    """
    cdef vd s[ND]
    cdef vd t[ND]
    cdef vd du
    cdef vd dv
    cdef vd ps = splat_d(p)
    cdef vd qs = splat_d(q)
    cdef Py_ssize_t i, j, k, rest = n % LANES
    cdef const int64_t* mask = last_masks + rest
    for j in range(ND):
        s[j] = (<vd*> first)[j]
        t[j] = (<vd*> second)[j]
    for k in range(n // LANES):
        i = k * LANES
        prefetch(u + next_u + i)
        if pair:
            prefetch(v + next_v + i)
        for j in range(ND):
            du = relative(u + i + j * VD, ps, shifted)
            add_pack(s + j, t + j, du, relative(v + i + j * VD, qs, shifted) if pair else du, shifted)
    if rest:
        i = n - LANES
        for j in range(ND):
            if (j + 1) * VD > LANES - rest:
                du = masked(relative(u + i + j * VD, ps, shifted), mask + j * VD)
                dv = du
                if pair:
                    dv = masked(relative(v + i + j * VD, qs, shifted), mask + j * VD)
                add_pack(s + j, t + j, du, dv, shifted)
    for j in range(ND):
        (<vd*> first)[j] = s[j]
        (<vd*> second)[j] = t[j]


cdef inline const floating* later(const floating* x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t ahead,
                                  Py_ssize_t width, Py_ssize_t k) noexcept nogil:
    """What to fetch, with `pitch`, while some rows of LANES columns (the k-th so many) are worked on.

    Where rows are one stretch of memory that is the rows that come later, in order; else their same place. Several rows
    within a page are more than the processor's own prefetching follows.
    """
    return x + ahead * stride + k * LANES * (rows if stride == width else 1)


cdef inline Py_ssize_t pitch(Py_ssize_t stride, Py_ssize_t width) noexcept nogil:
    return LANES if stride == width else stride


cdef inline void reduce_rows(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv,
                             Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, const double* p, const double* q,
                             bint pair, bint shifted, double* first, double* second) noexcept nogil:
    """Add rows to one pair of sums per column; su and sv are the distances between rows in values.

    The width is a multiple of LANES.
    """
    cdef vd s[ND]
    cdef vd t[ND]
    cdef vd ps[ND]
    cdef vd qs[ND]
    cdef vd du
    cdef Py_ssize_t i, j, k, r, pu = pitch(su, width), pv = pitch(sv, width)
    cdef const floating* next_u
    cdef const floating* next_v
    for k in range(width // LANES):
        i = k * LANES
        next_u = later(u, su, rows, ahead, width, k)
        next_v = later(v, sv, rows, ahead, width, k)
        for j in range(ND):
            s[j] = (<vd*> (first + i))[j]
            t[j] = (<vd*> (second + i))[j]
            ps[j] = (<vd*> (p + i))[j]
            qs[j] = (<vd*> (q + i))[j]
        for r in range(rows):
            prefetch(next_u + r * pu)
            if pair:
                prefetch(next_v + r * pv)
            for j in range(ND):
                du = relative(u + r * su + i + j * VD, ps[j], shifted)
                add_pack(s + j, t + j, du, relative(v + r * sv + i + j * VD, qs[j], shifted) if pair else du, shifted)
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
        if i:
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


cdef inline void apply_columns(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, floating* y,
                               Py_ssize_t sy, Py_ssize_t rows, const floating* p, const floating* a,
                               const floating* c, const floating* q, const floating* b, bint pair, bint stream,
                               Py_ssize_t width, pack* ps) noexcept nogil:
    """LANES columns of some rows, in packs of that width; ps is room for one coefficient."""
    cdef pack[LANES] as_
    cdef pack[LANES] cs
    cdef pack[LANES] qs
    cdef pack[LANES] bs
    cdef Py_ssize_t r, j, i
    for j in range(LANES // width):
        ps[j] = (<const pack*> (p + j * width))[0]
        as_[j] = (<const pack*> (a + j * width))[0]
        cs[j] = (<const pack*> (c + j * width))[0]
        qs[j] = (<const pack*> (q + j * width))[0]
        bs[j] = (<const pack*> (b + j * width))[0]
    for r in range(rows):
        for j in range(LANES // width):
            i = j * width
            put(y + r * sy + i, scaled(<const pack*> (u + r * su + i), <const pack*> (v + r * sv + i), ps[j], as_[j],
                                       cs[j], qs[j], bs[j], pair), stream)


cdef inline void apply_rows(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, floating* y,
                            Py_ssize_t sy, Py_ssize_t rows, Py_ssize_t width, const floating* p,
                            const floating* a, const floating* c, const floating* q, const floating* b, bint pair,
                            bint stream) noexcept nogil:
    """Scale and shift rows with one set of coefficients per column; the width is a multiple of LANES.

    With ``stream``, every row of y is aligned to LANES values, and shares no memory with u and v.
    """
    cdef Py_ssize_t i, k
    cdef vf[LANES] pf
    cdef vd[LANES] pd
    for k in range(width // LANES):
        i = k * LANES
        if floating is float:
            apply_columns(u + i, su, v + i, sv, y + i, sy, rows, p + i, a + i, c + i, q + i, b + i, pair, stream,
                          VF, pf)
        else:
            apply_columns(u + i, su, v + i, sv, y + i, sy, rows, p + i, a + i, c + i, q + i, b + i, pair, stream,
                          VD, pd)
