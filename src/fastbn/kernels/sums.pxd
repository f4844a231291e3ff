"""*reduce*, of the primitives (lanes.pxd): sums of runs and of rows, as many side by side as there are registers for."""
from cython cimport floating
from libc.stdint cimport int64_t

from .packs cimport (
    ABREAST, LANES, ND, VD, add_by_product, add_exact_product, last_masks, masked, prefetch_to, present, splat_d, vd, widen,
)


cdef enum:
    PAIRED = 4  # rows in the caches that are taken together, of two operands,
    ALONE = 8   # and of one


cdef inline void add_pack(vd* s, vd* t, vd du, vd dv, bint shifted, bint fused) noexcept nogil:
    """The formula of *reduce*, the only place where it stands; du and dv are relative to their shifts already."""
    s[0] = add_by_product(s[0], du) if fused else s[0] + du
    if shifted:
        t[0] = t[0] + du * dv
    else:
        t[0] = add_exact_product(t[0], du, dv)


cdef inline vd relative(const floating* x, vd shift, bint shifted) noexcept nogil:
    if shifted:
        return widen(x) - shift
    return widen(x)


cdef inline vd there(vd x, const floating* v, bint omits) noexcept nogil:
    """x, but 0 where it omits what is missing in v."""
    return present(x, widen(v)) if omits else x


cdef inline void add_values(const floating* u, const floating* v, vd p, vd q, vd* s, vd* t, Py_ssize_t j, bint pair,
                            bint shifted, bint omits, const int64_t* mask) noexcept nogil:
    """Pack j of LANES values, masked unless the mask is NULL, into the sums.

    Units that multiply take part in additions, so that those that add have time to widen: in all where there are two
    operands, in every other one where the sums of one are side by side.
    """
    cdef vd du = relative(u + j * VD, p, shifted)
    cdef vd dv = du
    if mask != NULL:
        du = dv = masked(du, mask + j * VD)
    if pair:
        dv = relative(v + j * VD, q, shifted)
        if mask != NULL:
            dv = masked(dv, mask + j * VD)
    add_pack(s, t, there(du, v + j * VD, omits), there(dv, v + j * VD, omits), shifted, pair or (ABREAST > 1 and j % 2 == 1))


cdef inline void reduce_abreast(const floating* u, Py_ssize_t cu, Py_ssize_t su, const floating* v, Py_ssize_t cv,
                                Py_ssize_t sv, Py_ssize_t channels, Py_ssize_t runs, Py_ssize_t n, const double* p,
                                const double* q, bint pair, bint shifted, bint omits, Py_ssize_t next_u, Py_ssize_t next_v,
                                bint second_level, bint begins, double* first, double* second) noexcept nogil:
    """`reduce_runs` of as many channels as have their sums side by side in registers, ABREAST at most.

    The runs that come next, so many values further on, are fetched meanwhile, to a second level cache or to the first: the
    processor's own prefetching would start anew with every run.
    The last chunk of a run overlaps the one before; values that were added already are masked.
    """
    cdef vd s[ABREAST * ND]
    cdef vd t[ABREAST * ND]
    cdef vd ps[ABREAST]
    cdef vd qs[ABREAST]
    cdef Py_ssize_t c, i, j, k, _r, rest = n % LANES
    for c in range(channels):
        ps[c] = splat_d(p[c])
        qs[c] = splat_d(q[c])
        for j in range(ND):
            s[c * ND + j] = t[c * ND + j] = splat_d(0)
    if not begins:
        for c in range(channels):
            for j in range(ND):
                s[c * ND + j] = (<vd*> (first + c * LANES))[j]
                t[c * ND + j] = (<vd*> (second + c * LANES))[j]
    for _r in range(runs):
        for k in range(n // LANES):
            i = k * LANES
            for c in range(channels):
                prefetch_to(u + c * cu + next_u + i, second_level)
                if pair:
                    prefetch_to(v + c * cv + next_v + i, second_level)
                for j in range(ND):
                    add_values(u + c * cu + i, v + c * cv + i, ps[c], qs[c], s + c * ND + j, t + c * ND + j, j, pair, shifted,
                               omits, NULL)
        if rest:
            i = n - LANES
            for c in range(channels):
                for j in range(ND):
                    if (j + 1) * VD > LANES - rest:
                        add_values(u + c * cu + i, v + c * cv + i, ps[c], qs[c], s + c * ND + j, t + c * ND + j, j, pair,
                                   shifted, omits, last_masks + rest)
        u += su
        v += sv
    for c in range(channels):
        for j in range(ND):
            (<vd*> (first + c * LANES))[j] = s[c * ND + j]
            (<vd*> (second + c * LANES))[j] = t[c * ND + j]


cdef inline void reduce_runs(const floating* u, Py_ssize_t cu, Py_ssize_t su, const floating* v, Py_ssize_t cv,
                             Py_ssize_t sv, Py_ssize_t channels, Py_ssize_t runs, Py_ssize_t n, const double* p,
                             const double* q, bint pair, bint shifted, bint omits, bint abreast, Py_ssize_t next_u,
                             Py_ssize_t next_v, bint second_level, bint begins, double* first, double* second) noexcept nogil:
    """Add runs of n >= LANES values of each channel, su and sv values apart, to its LANES pairs of sums, which may begin here.

    Channels are cu and cv values apart. Where it omits, pairs whose v is NaN add nothing.
    """
    cdef Py_ssize_t c = 0
    while ABREAST > 1 and abreast and c + ABREAST <= channels:
        reduce_abreast(u + c * cu, cu, su, v + c * cv, cv, sv, ABREAST, runs, n, p + c, q + c, pair, shifted, omits, next_u,
                       next_v, second_level, begins, first + c * LANES, second + c * LANES)
        c += ABREAST
    while c < channels:
        reduce_abreast(u + c * cu, cu, su, v + c * cv, cv, sv, 1, runs, n, p + c, q + c, pair, shifted, omits, next_u,
                       next_v, second_level, begins, first + c * LANES, second + c * LANES)
        c += 1


cdef inline const floating* later(const floating* x, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t ahead,
                                  Py_ssize_t width, Py_ssize_t k) noexcept nogil:
    """What to fetch, with `pitch`, while some rows of a few columns, from the k-th LANES on, are worked on.

    Where rows are one stretch of memory that is the rows that come later, in order; else their same place. Several rows
    within a page are more than the processor's own prefetching follows.
    """
    return x + ahead * stride + k * LANES * (rows if stride == width else 1)


cdef inline Py_ssize_t pitch(Py_ssize_t stride, Py_ssize_t width, Py_ssize_t count) noexcept nogil:
    """From one row to the next of what is fetched, of so many times LANES columns."""
    return count * LANES if stride == width else stride


cdef inline void reduce_columns(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, Py_ssize_t rows,
                                Py_ssize_t ahead, Py_ssize_t width, Py_ssize_t k, Py_ssize_t count, const double* p,
                                const double* q, bint pair, bint shifted, bint omits, bint fetches, bint second_level,
                                bint begins, double* first, double* second) noexcept nogil:
    """`reduce_rows` of so many times LANES columns, ABREAST at most, from the k-th on: their sums are side by side."""
    cdef vd s[ABREAST * ND]
    cdef vd t[ABREAST * ND]
    cdef vd ps[ABREAST * ND]
    cdef vd qs[ABREAST * ND]
    cdef const floating* next_u = later(u, su, rows, ahead, width, k)
    cdef const floating* next_v = later(v, sv, rows, ahead, width, k)
    cdef Py_ssize_t i = k * LANES, c, j, r, pu = pitch(su, width, count), pv = pitch(sv, width, count)
    for j in range(count * ND):
        s[j] = t[j] = splat_d(0)
        ps[j] = (<vd*> (p + i))[j]
        qs[j] = (<vd*> (q + i))[j]
    if not begins:
        for j in range(count * ND):
            s[j] = (<vd*> (first + i))[j]
            t[j] = (<vd*> (second + i))[j]
    for r in range(rows):
        for c in range(count if fetches else 0):
            prefetch_to(next_u + r * pu + c * LANES, second_level)
            if pair:
                prefetch_to(next_v + r * pv + c * LANES, second_level)
        for j in range(count * ND):
            add_values(u + r * su + i, v + r * sv + i, ps[j], qs[j], s + j, t + j, j, pair, shifted, omits, NULL)
    for j in range(count * ND):
        (<vd*> (first + i))[j] = s[j]
        (<vd*> (second + i))[j] = t[j]


cdef inline void reduce_rows(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv,
                             Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, const double* p, const double* q,
                             bint pair, bint shifted, bint omits, bint fetches, bint second_level, bint begins, double* first,
                             double* second) noexcept nogil:
    """Add rows to one pair of sums per column, which may begin here; su and sv are the distances between rows in values.

    Where it omits, pairs whose v is NaN add nothing. The width is a multiple of LANES.
    """
    cdef Py_ssize_t k = 0, end = width // LANES
    while ABREAST > 1 and k + ABREAST <= end:
        reduce_columns(u, su, v, sv, rows, ahead, width, k, ABREAST, p, q, pair, shifted, omits, fetches, second_level, begins,
                       first, second)
        k += ABREAST
    while k < end:
        reduce_columns(u, su, v, sv, rows, ahead, width, k, 1, p, q, pair, shifted, omits, fetches, second_level, begins,
                       first, second)
        k += 1


cdef inline void reduce_near_rows(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, Py_ssize_t rows,
                                  Py_ssize_t width, const double* p, const double* q, bint pair, bint shifted, bint begins,
                                  double* first, double* second) noexcept nogil:
    """`reduce_rows` of rows that are in the caches: a few together, in a loop without an end to foresee, and none is fetched."""
    cdef Py_ssize_t tall = PAIRED if pair else ALONE
    while rows >= tall:
        reduce_rows(u, su, v, sv, tall, 0, width, p, q, pair, shifted, False, False, False, begins, first, second)
        u += tall * su
        v += tall * sv
        rows -= tall
        begins = False
    if rows:
        reduce_rows(u, su, v, sv, rows, 0, width, p, q, pair, shifted, False, False, False, begins, first, second)
