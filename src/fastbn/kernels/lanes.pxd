"""The primitives: the four loops through which every value of every array goes.

    reduce    first += u - p,   second += (u - p) * (v - q)
    apply     y = (u - p) * a + c          or, with a second operand,   ((u - p) + ((v - q) * b + c)) * a
              y = act((u - p) * a + c + w)          with w, the residual, or without
              y = u * act'((v - p) * a + c + w)     the *gate* through which a gradient u comes before all else

each once along runs of one channel (``*_runs``: p, q, a, b, c are a number for each) and once along rows in which the
channels are neighbours (``*_rows``: one for each column). A call takes the runs of several channels: with one for each,
what is around the loops took as long as a plane of 7 x 7 values. With u = v = x and p a shift, *reduce* gives the moments; with u = dy,
v = x, p = 0 and q the mean it gives the sums of the gradient. With ``pair`` false the second operand is never read:
the argument is a constant wherever these functions are inlined, so the compiler drops the branch.

Sums are float64 and go into LANES virtual lanes, by a value's place in its run or its column: the order of additions is
that of the source at every instruction set level. Lanes are handled in packs (packs.pxd).

*apply* loads a pack before it stores it, so that y may be u, v or w itself and no alias check is needed.
"""
from cython cimport floating
from libc.stdint cimport int64_t

from .activations cimport SIDE, bent, clipped, smooth
from .packs cimport (
    ABREAST, LANES, ND, NF, VD, VF, add_by_product, add_exact_product, last_masks, masked, pack, prefetch,
    prefetch_second, present, select, splat, splat_d, splat_f, stream_d, stream_f, vd, vf, widen,
)


cdef enum Bend:
    STRAIGHT  # no activation
    CLIPPED   # between lo and hi; numbers: lo, 0 or NaN, and hi, positive or NaN: NaN is no bound
    BENT      # times a slope where not positive; numbers: slope
    SMOOTH    # z * sigmoid(k1 z + k3 z^3); numbers: k1, k3
    WEIGHTED  # none, but the gradient where x counts by w (1 without), or is missing; numbers: 0 if NaN is missing, else 1
    PRESENT   # the same where the statistics were constants


cdef enum:
    ASIDE = 4  # packs of a run with a smooth activation that are worked on side by side
    WIDE = 512  # columns; the coefficients of so many are loaded once
    TALL = 4  # for so many rows


cdef struct Form:
    # What *apply* computes; see `scaled`.
    bint pair     # reads v
    bint third    # reads w
    int bend
    double[3] numbers


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
                                bint begins, double* first, double* second) noexcept nogil:
    """`reduce_runs` of as many channels as have their sums side by side in registers, ABREAST at most.

    The runs that come next, so many values further on, are fetched meanwhile: the processor's own prefetching would
    start anew with every run.
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
                prefetch(u + c * cu + next_u + i)
                if pair:
                    prefetch(v + c * cv + next_v + i)
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
                             Py_ssize_t next_v, bint begins, double* first, double* second) noexcept nogil:
    """Add runs of n >= LANES values of each channel, su and sv values apart, to its LANES pairs of sums, which may begin here.

    Channels are cu and cv values apart. Where it omits, pairs whose v is NaN add nothing.
    """
    cdef Py_ssize_t c = 0
    while ABREAST > 1 and abreast and c + ABREAST <= channels:
        reduce_abreast(u + c * cu, cu, su, v + c * cv, cv, sv, ABREAST, runs, n, p + c, q + c, pair, shifted, omits, next_u,
                       next_v, begins, first + c * LANES, second + c * LANES)
        c += ABREAST
    while c < channels:
        reduce_abreast(u + c * cu, cu, su, v + c * cv, cv, sv, 1, runs, n, p + c, q + c, pair, shifted, omits, next_u,
                       next_v, begins, first + c * LANES, second + c * LANES)
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
                                const double* q, bint pair, bint shifted, bint omits, double* first,
                                double* second) noexcept nogil:
    """`reduce_rows` of so many times LANES columns, ABREAST at most, from the k-th on: their sums are side by side."""
    cdef vd s[ABREAST * ND]
    cdef vd t[ABREAST * ND]
    cdef vd ps[ABREAST * ND]
    cdef vd qs[ABREAST * ND]
    cdef const floating* next_u = later(u, su, rows, ahead, width, k)
    cdef const floating* next_v = later(v, sv, rows, ahead, width, k)
    cdef Py_ssize_t i = k * LANES, c, j, r, pu = pitch(su, width, count), pv = pitch(sv, width, count)
    for j in range(count * ND):
        s[j] = (<vd*> (first + i))[j]
        t[j] = (<vd*> (second + i))[j]
        ps[j] = (<vd*> (p + i))[j]
        qs[j] = (<vd*> (q + i))[j]
    for r in range(rows):
        for c in range(count):
            prefetch(next_u + r * pu + c * LANES)
            if pair:
                prefetch(next_v + r * pv + c * LANES)
        for j in range(count * ND):
            add_values(u + r * su + i, v + r * sv + i, ps[j], qs[j], s + j, t + j, j, pair, shifted, omits, NULL)
    for j in range(count * ND):
        (<vd*> (first + i))[j] = s[j]
        (<vd*> (second + i))[j] = t[j]


cdef inline void reduce_rows(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv,
                             Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, const double* p, const double* q,
                             bint pair, bint shifted, bint omits, double* first, double* second) noexcept nogil:
    """Add rows to one pair of sums per column; su and sv are the distances between rows in values.

    Where it omits, pairs whose v is NaN add nothing. The width is a multiple of LANES.
    """
    cdef Py_ssize_t k = 0, end = width // LANES
    while ABREAST > 1 and k + ABREAST <= end:
        reduce_columns(u, su, v, sv, rows, ahead, width, k, ABREAST, p, q, pair, shifted, omits, first, second)
        k += ABREAST
    while k < end:
        reduce_columns(u, su, v, sv, rows, ahead, width, k, 1, p, q, pair, shifted, omits, first, second)
        k += 1


cdef inline pack counted(pack u, pack v, pack w, pack a, pack c, pack q, pack b, pack kept, bint frozen) noexcept nogil:
    """The gradient (u + w * ((v - q) * b + c)) * a of weighted statistics; 0 where v is missing.

    Missing is what has no weight and is not finite. What has none is selected out, never multiplied. a is NaN where a NaN
    counted.
    """
    cdef pack zero = splat(0, u)
    cdef pack z = u
    w = select(v, v, w, w * kept)
    if not frozen:
        z = u + select(w, zero, zero, w * ((v - q) * b + c))
    return select(w, zero, select(v - v, zero, z, zero), z) * a


cdef inline pack straight(const pack* x, const pack* w, pack p, pack a, pack c, bint third) noexcept nogil:
    """What comes before an activation."""
    cdef pack z = (x[0] - p) * a + c
    return z + w[0] if third else z


cdef inline pack scaled(const pack* u, const pack* v, const pack* w, pack p, pack a, pack c, pack q, pack b, pack k0,
                        pack k1, pack k2, bint pair, bint third, int bend) noexcept nogil:
    """The formula of *apply*, the only place where it stands."""
    cdef pack z
    if bend == WEIGHTED or bend == PRESENT:
        return counted(u[0], v[0], w[0] if third else splat(1, p), a, c, q, b, k0, bend == PRESENT)
    if pair and bend == STRAIGHT:
        return ((u[0] - p) + ((v[0] - q) * b + c)) * a
    z = straight(v if pair else u, w, p, a, c, third)
    if bend == CLIPPED:
        return clipped(z, k0, k1, u[0], pair)
    if bend == BENT:
        return bent(z, k0, u[0], pair)
    if bend == SMOOTH:
        smooth(&z, u, 1, k0, k1, pair)
    return z


cdef inline void scaled_aside(const pack* u, const pack* v, const pack* w, const pack* p, const pack* a, const pack* c,
                              Py_ssize_t step, Py_ssize_t count, pack k0, pack k1, bint pair, bint third,
                              pack* zs) noexcept nogil:
    """`scaled` of neighbouring packs with a smooth activation; the coefficients of each are some packs apart, or the same."""
    cdef Py_ssize_t j
    for j in range(count):
        zs[j] = straight((v if pair else u) + j, w + j, p[j * step], a[j * step], c[j * step], third)
    smooth(zs, u, count, k0, k1, pair)


cdef inline void put(floating* y, pack z, bint stream) noexcept nogil:
    """Store a pack; past the caches only where y is aligned to packs."""
    if stream:
        if floating is float and pack is vf:
            stream_f(y, z)
        elif floating is double and pack is vd:
            stream_d(y, z)
    else:
        (<pack*> y)[0] = z


cdef inline void apply_packs(const floating* u, const floating* v, const floating* w, floating* y, Py_ssize_t n, pack p,
                             pack a, pack c, pack q, pack b, const double* numbers, Py_ssize_t width, bint pair,
                             bint third, int bend, bint stream) noexcept nogil:
    """n >= width values in packs of that width, the second from where y is aligned to packs, unless they are costly.

    So the first pack overlaps the second, and the last the one before: every pack is computed before the one that precedes
    it is stored, and y may be u, v or w. With ``stream`` y is aligned.
    """
    cdef Py_ssize_t _k, j
    cdef Py_ssize_t i = 0
    cdef Py_ssize_t end = n - width
    cdef pack k0 = splat(numbers[0], p)
    cdef pack k1 = splat(numbers[1], p)
    cdef pack k2 = splat(numbers[2], p)
    cdef pack z = scaled(<const pack*> u, <const pack*> v, <const pack*> w, p, a, c, q, b, k0, k1, k2, pair, third, bend)
    cdef pack after
    cdef pack zs[ASIDE]
    if not stream and bend != SMOOTH:
        i = (width - <Py_ssize_t> (<size_t> y // sizeof(floating) % <size_t> width)) % width
        if end < width:  # else the last would overlap the first as well
            i = 0
        if i:
            after = scaled(<const pack*> (u + i), <const pack*> (v + i), <const pack*> (w + i), p, a, c, q, b, k0, k1, k2,
                           pair, third, bend)
            (<pack*> y)[0] = z
            z = after
    if bend == SMOOTH:
        for _k in range(((n - i) // width - 1) // ASIDE):
            scaled_aside(<const pack*> (u + i + width), <const pack*> (v + i + width), <const pack*> (w + i + width), &p, &a,
                         &c, 0, ASIDE, k0, k1, pair, third, zs)
            put(y + i, z, stream)
            for j in range(ASIDE - 1):
                put(y + i + (j + 1) * width, zs[j], stream)
            z = zs[ASIDE - 1]
            i = i + ASIDE * width
    for _k in range((n - i) // width - 1):
        after = scaled(<const pack*> (u + i + width), <const pack*> (v + i + width), <const pack*> (w + i + width), p, a, c,
                       q, b, k0, k1, k2, pair, third, bend)
        put(y + i, z, stream)
        z = after
        i = i + width
    if i < end:
        after = scaled(<const pack*> (u + end), <const pack*> (v + end), <const pack*> (w + end), p, a, c, q, b, k0, k1, k2,
                       pair, third, bend)
        put(y + i, z, stream)
        (<pack*> (y + end))[0] = after
    else:
        put(y + i, z, stream)


cdef inline void runs_as(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, const floating* w,
                         Py_ssize_t sw, floating* y, Py_ssize_t sy, Py_ssize_t runs, Py_ssize_t n, const floating* p,
                         Py_ssize_t stride, const double* numbers, bint pair, bint third, int bend,
                         bint stream) noexcept nogil:
    cdef Py_ssize_t r
    cdef const floating* a = p + stride
    cdef const floating* c = a + stride
    cdef const floating* q = c + stride
    cdef const floating* b = q + stride
    for r in range(runs):
        if floating is float:
            apply_packs[float, vf](u, v, w, y, n, splat_f(p[r]), splat_f(a[r]), splat_f(c[r]), splat_f(q[r]),
                                   splat_f(b[r]), numbers, VF, pair, third, bend, stream)
        else:
            apply_packs[double, vd](u, v, w, y, n, splat_d(p[r]), splat_d(a[r]), splat_d(c[r]), splat_d(q[r]),
                                    splat_d(b[r]), numbers, VD, pair, third, bend, stream)
        u += su
        v += sv
        w += sw
        y += sy


cdef inline void runs_by(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, const floating* w,
                         Py_ssize_t sw, floating* y, Py_ssize_t sy, Py_ssize_t runs, Py_ssize_t n, const floating* p,
                         Py_ssize_t stride, const Form* f, bint stream, int bend) noexcept nogil:
    """*apply* of a kind of bend, a constant where this is compiled. A gate never streams: its result is read next."""
    cdef const double* k = f.numbers
    cdef bint weighted = bend == WEIGHTED or bend == PRESENT
    if f.pair or weighted:
        if f.third and weighted and stream:
            runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, True, True, bend, True)
        elif f.third and bend != STRAIGHT:
            runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, True, True, bend, False)
        elif stream and (weighted or bend == STRAIGHT):
            runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, True, False, bend, True)
        else:
            runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, True, False, bend, False)
    elif f.third and stream:
        runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, False, True, bend, True)
    elif f.third:
        runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, False, True, bend, False)
    elif stream:
        runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, False, False, bend, True)
    else:
        runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, False, False, bend, False)


cdef inline void apply_runs(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, const floating* w,
                            Py_ssize_t sw, floating* y, Py_ssize_t sy, Py_ssize_t runs, Py_ssize_t n, const floating* p,
                            Py_ssize_t stride, const Form* f, bint stream) noexcept nogil:
    """Scale and shift runs of n >= LANES values, each of another channel, su to sy values apart.

    Coefficients lie as [p, a, c, q, b][run], the first of each so many apart.
    """
    if f.bend == STRAIGHT:
        runs_by(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, f, stream, STRAIGHT)
    elif f.bend == CLIPPED:
        runs_by(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, f, stream, CLIPPED)
    elif f.bend == BENT:
        runs_by(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, f, stream, BENT)
    elif f.bend == SMOOTH:
        runs_by(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, f, stream, SMOOTH)
    elif f.bend == WEIGHTED:
        runs_by(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, f, stream, WEIGHTED)
    else:
        runs_by(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, f, stream, PRESENT)


cdef inline void apply_lanes(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, const floating* w,
                             Py_ssize_t sw, floating* y, Py_ssize_t sy, Py_ssize_t rows, const floating* p,
                             const floating* a, const floating* c, const floating* q, const floating* b,
                             const double* numbers, Py_ssize_t columns, Py_ssize_t width, bint pair, bint third, int bend,
                             bint stream, pack* zs) noexcept nogil:
    """Some columns of some rows, in packs of that width; zs is room for them. All are computed before the first is stored.

    With a smooth activation there is one row.
    """
    cdef Py_ssize_t j, i, r, packs = columns // width
    cdef pack k0 = splat(numbers[0], zs[0])
    cdef pack k1 = splat(numbers[1], zs[0])
    cdef pack k2 = splat(numbers[2], zs[0])
    if bend == SMOOTH:
        scaled_aside(<const pack*> u, <const pack*> v, <const pack*> w, <const pack*> p, <const pack*> a, <const pack*> c, 1,
                     packs, k0, k1, pair, third, zs)
    for j in range(packs if bend != SMOOTH else 0):
        i = j * width
        for r in range(rows):
            zs[r * packs + j] = scaled(<const pack*> (u + r * su + i), <const pack*> (v + r * sv + i),
                                       <const pack*> (w + r * sw + i), (<const pack*> (p + i))[0], (<const pack*> (a + i))[0],
                                       (<const pack*> (c + i))[0], (<const pack*> (q + i))[0], (<const pack*> (b + i))[0],
                                       k0, k1, k2, pair, third, bend)
    for r in range(rows):
        for j in range(packs):
            put(y + r * sy + j * width, zs[r * packs + j], stream)


cdef inline void lanes_as(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, const floating* w,
                          Py_ssize_t sw, floating* y, Py_ssize_t sy, Py_ssize_t rows, const floating* p, const floating* a,
                          const floating* c, const floating* q, const floating* b, const double* numbers,
                          Py_ssize_t columns, bint pair, bint third, int bend, bint stream) noexcept nogil:
    """LANES columns of up to TALL rows, or twice as many of one."""
    cdef vf[TALL * NF] zf
    cdef vd[TALL * ND] zd
    if floating is float:
        apply_lanes(u, su, v, sv, w, sw, y, sy, rows, p, a, c, q, b, numbers, columns, VF, pair, third, bend, stream, zf)
    else:
        apply_lanes(u, su, v, sv, w, sw, y, sy, rows, p, a, c, q, b, numbers, columns, VD, pair, third, bend, stream, zd)


cdef inline void in_order_as(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, const floating* w,
                             Py_ssize_t sw, floating* y, Py_ssize_t sy, Py_ssize_t rows, Py_ssize_t width,
                             Py_ssize_t ahead, const floating* p, const floating* a, const floating* c, const floating* q,
                             const floating* b, const double* numbers, bint pair, bint third, int bend, bint stream,
                             bint apart) noexcept nogil:
    """Rows in one loop. Where they lie apart, their places some rows ahead are fetched: what the processor fetches by itself
    ends with every row."""
    cdef Py_ssize_t i = 0, _k, end
    for _k in range(rows * (width // LANES)):
        if apart:
            prefetch_second(u + ahead * su)
            if pair:
                prefetch_second(v + ahead * sv)
            if third:
                prefetch_second(w + ahead * sw)
            if not stream:
                prefetch_second(y + ahead * sy)
        lanes_as(u, 0, v, 0, w, 0, y, 0, 1, p + i, a + i, c + i, q + i, b + i, numbers, LANES, pair, third, bend, stream)
        i += LANES
        end = -<Py_ssize_t> (i == width)  # all bits at the end of a row: arithmetic, no branch
        u += LANES + (end & (su - width))
        v += LANES + (end & (sv - width))
        w += LANES + (end & (sw - width))
        y += LANES + (end & (sy - width))
        i &= ~end


cdef inline void rows_as(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, const floating* w,
                         Py_ssize_t sw, floating* y, Py_ssize_t sy, Py_ssize_t rows, Py_ssize_t width, bint large,
                         Py_ssize_t ahead, const floating* p, const floating* a, const floating* c, const floating* q,
                         const floating* b, const double* numbers, bint pair, bint third, int bend,
                         bint stream) noexcept nogil:
    """Rows in the order of memory, in one loop or in one for each row; ahead is 0 where nothing is to be fetched."""
    # Of a smooth activation more packs than there are in LANES are worked on side by side, and memory is never waited for.
    cdef bint twice = bend == SMOOTH and 2 * LANES <= SIDE * (sizeof(vd) // sizeof(floating))
    cdef Py_ssize_t i, k, r = 0, columns = 2 * LANES if twice else LANES
    while pair and bend != SMOOTH and not stream and width >= WIDE and r + TALL <= rows and not (large and ahead):
        for k in range(width // LANES):
            i = k * LANES
            lanes_as(u + r * su + i, su, v + r * sv + i, sv, w + r * sw + i, sw, y + r * sy + i, sy, TALL, p + i, a + i,
                     c + i, q + i, b + i, numbers, LANES, pair, third, bend, stream)
        r += TALL
    if large and not twice:
        if ahead:
            in_order_as(u, su, v, sv, w, sw, y, sy, rows, width, ahead, p, a, c, q, b, numbers, pair, third, bend, stream, True)
        else:
            in_order_as(u + r * su, su, v + r * sv, sv, w + r * sw, sw, y + r * sy, sy, rows - r, width, 0, p, a, c, q, b,
                        numbers, pair, third, bend, stream, False)
        return
    while r < rows:
        for k in range(width // columns):
            i = k * columns
            lanes_as(u + r * su + i, 0, v + r * sv + i, 0, w + r * sw + i, 0, y + r * sy + i, 0, 1, p + i, a + i, c + i,
                     q + i, b + i, numbers, columns, pair, third, bend, stream)
        if twice and width % columns:
            i = width - LANES
            lanes_as(u + r * su + i, 0, v + r * sv + i, 0, w + r * sw + i, 0, y + r * sy + i, 0, 1, p + i, a + i, c + i,
                     q + i, b + i, numbers, LANES, pair, third, bend, stream)
        r += 1


cdef inline void rows_by(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, const floating* w,
                         Py_ssize_t sw, floating* y, Py_ssize_t sy, Py_ssize_t rows, Py_ssize_t width, bint large,
                         Py_ssize_t ahead, const floating* p, const floating* a, const floating* c, const floating* q,
                         const floating* b, const Form* f, bint stream, int bend) noexcept nogil:
    """*apply* of a kind of bend, a constant where this is compiled. A gate never streams: its result is read next."""
    cdef const double* k = f.numbers
    cdef bint weighted = bend == WEIGHTED or bend == PRESENT
    if f.pair or weighted:
        if f.third and weighted and stream:
            rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, True, True, bend, True)
        elif f.third and bend != STRAIGHT:
            rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, True, True, bend, False)
        elif stream and (weighted or bend == STRAIGHT):
            rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, True, False, bend, True)
        else:
            rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, True, False, bend, False)
    elif f.third and stream:
        rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, False, True, bend, True)
    elif f.third:
        rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, False, True, bend, False)
    elif stream:
        rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, False, False, bend, True)
    else:
        rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, False, False, bend, False)


cdef inline void apply_rows(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, const floating* w,
                            Py_ssize_t sw, floating* y, Py_ssize_t sy, Py_ssize_t rows, Py_ssize_t width, bint large,
                            Py_ssize_t ahead, const floating* p, const floating* a, const floating* c, const floating* q,
                            const floating* b, const Form* f, bint stream) noexcept nogil:
    """Scale and shift rows with one set of coefficients per column; the width is a multiple of LANES.

    With ``stream``, every row of y is aligned to LANES values, and shares no memory with u, v and w.
    """
    if f.bend == STRAIGHT:
        rows_by(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, f, stream, STRAIGHT)
    elif f.bend == CLIPPED:
        rows_by(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, f, stream, CLIPPED)
    elif f.bend == BENT:
        rows_by(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, f, stream, BENT)
    elif f.bend == SMOOTH:
        rows_by(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, f, stream, SMOOTH)
    elif f.bend == WEIGHTED:
        rows_by(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, f, stream, WEIGHTED)
    else:
        rows_by(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, f, stream, PRESENT)
