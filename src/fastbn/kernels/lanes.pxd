"""The primitives: the four loops through which every value of every array goes, *apply* here and *reduce* in sums.pxd.

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
from .activations cimport SIDE, bent, clipped, smooth
from .kinds cimport BFLOAT, DOUBLE, HALF, size_of
from .packs cimport (
    ABREAST, LANES, ND, NF, VD, VF, load_bfloat_pack, load_half_pack, pack, prefetch_second, select, splat, splat_d, splat_f,
    store_bfloat_pack, store_half_pack, stream_d, stream_f, vd, vf,
)


cdef enum Bend:
    STRAIGHT  # no activation
    CLIPPED   # between lo and hi; numbers: lo, 0 or NaN, and hi, positive or NaN: NaN is no bound
    BENT      # times a slope where not positive; numbers: slope
    SMOOTH    # z * sigmoid(k1 z + k3 z^3); numbers: k1, k3
    WEIGHTED  # none, but the gradient where x counts by w (1 without), or is missing; numbers: 0 if NaN is missing, else 1
    PRESENT   # the same where the statistics were constants


cdef enum:
    ASIDE = 4  # packs with a smooth activation that are worked on side by side
    WIDE = 512  # columns; the coefficients of so many are loaded once
    TALL = 4  # for so many rows,
    BAND = 8  # and of fewer columns for so many
    HELD = 7  # times LANES columns of a row at most whose coefficients stay in registers


cdef struct Form:
    # What *apply* computes; see `scaled`.
    bint pair     # reads v
    bint third    # reads w
    int bend
    double[3] numbers


cdef inline bint is_weighted(int bend) noexcept nogil:
    """Whether it is a gradient of values that do not all count alike; the third operand, if there is one, are weights then."""
    return bend == WEIGHTED or bend == PRESENT


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


cdef inline pack fetch(const char* x, int kind, pack like) noexcept nogil:
    """A pack of values of a kind."""
    if pack is vf:
        if kind == HALF:
            return load_half_pack(x)
        if kind == BFLOAT:
            return load_bfloat_pack(x)
    return (<const pack*> x)[0]


cdef inline void put(char* y, int kind, pack z, bint stream) noexcept nogil:
    """Store a pack, rounded to a kind; past the caches only where y is aligned to packs."""
    if pack is vf:
        if kind == HALF:
            store_half_pack(y, z, stream)
        elif kind == BFLOAT:
            store_bfloat_pack(y, z, stream)
        elif stream:
            stream_f(<float*> y, z)
        else:
            (<pack*> y)[0] = z
    elif stream:
        stream_d(<double*> y, z)
    else:
        (<pack*> y)[0] = z


cdef inline pack straight(pack x, pack w, pack p, pack a, pack c, bint third) noexcept nogil:
    """What comes before an activation."""
    cdef pack z = (x - p) * a + c
    return z + w if third else z


cdef inline pack scaled(const char* u, const char* v, const char* w, int kind, pack p, pack a, pack c, pack q, pack b, pack k0,
                        pack k1, pack k2, bint pair, bint third, int bend) noexcept nogil:
    """The formula of *apply*, the only place where it stands."""
    cdef pack x = fetch(u, kind, p)
    cdef pack x2 = fetch(v, kind, p) if pair else x
    cdef pack x3 = fetch(w, kind, p) if third else splat(1, p)
    cdef pack z
    if is_weighted(bend):
        return counted(x, x2, x3, a, c, q, b, k0, bend == PRESENT)
    if pair and bend == STRAIGHT:
        return ((x - p) + ((x2 - q) * b + c)) * a
    z = straight(x2, x3, p, a, c, third)
    if bend == CLIPPED:
        return clipped(z, k0, k1, x, pair)
    if bend == BENT:
        return bent(z, k0, x, pair)
    if bend == SMOOTH:
        smooth(&z, &x, 1, k0, k1, pair)
    return z


cdef inline void scaled_aside(const pack* u, const pack* v, const pack* w, const pack* p, const pack* a, const pack* c,
                              Py_ssize_t step, Py_ssize_t count, pack k0, pack k1, bint pair, bint third,
                              pack* zs) noexcept nogil:
    """`scaled` of neighbouring packs with a smooth activation; the coefficients of each are some packs apart, or the same."""
    cdef Py_ssize_t j
    for j in range(count):
        zs[j] = straight((v if pair else u)[j], w[j] if third else u[j], p[j * step], a[j * step], c[j * step], third)
    smooth(zs, u, count, k0, k1, pair)


cdef inline void apply_packs(const char* u, const char* v, const char* w, char* y, Py_ssize_t n, pack p, pack a, pack c,
                             pack q, pack b, const double* numbers, Py_ssize_t width, int kind, bint pair, bint third,
                             int bend, bint stream) noexcept nogil:
    """n >= width values in packs of that width, the second from where y is aligned to packs, unless they are costly.

    So the first pack overlaps the second, and the last the one before: every pack is computed before the one that precedes
    it is stored, and y may be u, v or w. With ``stream`` y is aligned.
    """
    cdef Py_ssize_t _k, j, size = size_of(kind)
    cdef Py_ssize_t i = 0, step = width * size  # bytes, and so is what follows
    cdef Py_ssize_t end = (n - width) * size
    cdef pack k0 = splat(numbers[0], p)
    cdef pack k1 = splat(numbers[1], p)
    cdef pack k2 = splat(numbers[2], p)
    cdef pack z = scaled(u, v, w, kind, p, a, c, q, b, k0, k1, k2, pair, third, bend)
    cdef pack after
    cdef pack zs[ASIDE]
    if not stream and bend != SMOOTH:
        i = (width - <Py_ssize_t> (<size_t> y // size % <size_t> width)) % width * size
        if end < step:  # else the last would overlap the first as well
            i = 0
        if i:
            after = scaled(u + i, v + i, w + i, kind, p, a, c, q, b, k0, k1, k2, pair, third, bend)
            put(y, kind, z, False)
            z = after
    if bend == SMOOTH:
        for _k in range((end // step) // ASIDE):
            scaled_aside(<const pack*> (u + i + step), <const pack*> (v + i + step), <const pack*> (w + i + step), &p, &a, &c,
                         0, ASIDE, k0, k1, pair, third, zs)
            put(y + i, kind, z, stream)
            for j in range(ASIDE - 1):
                put(y + i + (j + 1) * step, kind, zs[j], stream)
            z = zs[ASIDE - 1]
            i = i + ASIDE * step
    for _k in range((end - i) // step):
        after = scaled(u + i + step, v + i + step, w + i + step, kind, p, a, c, q, b, k0, k1, k2, pair, third, bend)
        put(y + i, kind, z, stream)
        z = after
        i = i + step
    if i < end:
        after = scaled(u + end, v + end, w + end, kind, p, a, c, q, b, k0, k1, k2, pair, third, bend)
        put(y + i, kind, z, stream)
        put(y + end, kind, after, False)
    else:
        put(y + i, kind, z, stream)


cdef inline void runs_as(const char* u, Py_ssize_t su, const char* v, Py_ssize_t sv, const char* w,
                         Py_ssize_t sw, char* y, Py_ssize_t sy, Py_ssize_t runs, Py_ssize_t n, const floating* p,
                         Py_ssize_t stride, const double* numbers, int kind, bint pair, bint third, int bend,
                         bint stream) noexcept nogil:
    cdef Py_ssize_t r
    cdef const floating* a = p + stride
    cdef const floating* c = a + stride
    cdef const floating* q = c + stride
    cdef const floating* b = q + stride
    for r in range(runs):
        if floating is float:
            apply_packs[vf](u, v, w, y, n, splat_f(p[r]), splat_f(a[r]), splat_f(c[r]), splat_f(q[r]),
                                   splat_f(b[r]), numbers, VF, kind, pair, third, bend, stream)
        else:
            apply_packs[vd](u, v, w, y, n, splat_d(p[r]), splat_d(a[r]), splat_d(c[r]), splat_d(q[r]),
                                    splat_d(b[r]), numbers, VD, kind, pair, third, bend, stream)
        u += su
        v += sv
        w += sw
        y += sy


cdef inline void runs_by(const char* u, Py_ssize_t su, const char* v, Py_ssize_t sv, const char* w,
                         Py_ssize_t sw, char* y, Py_ssize_t sy, Py_ssize_t runs, Py_ssize_t n, const floating* p,
                         Py_ssize_t stride, const Form* f, bint stream, int kind, int bend) noexcept nogil:
    """*apply* of a kind of bend, a constant where this is compiled. A gate never streams: its result is read next."""
    cdef const double* k = f.numbers
    cdef bint weighted = is_weighted(bend)
    if (f.pair or weighted) and (kind <= DOUBLE or bend == STRAIGHT):
        if f.third and weighted and stream:
            runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, kind, True, True, bend, True)
        elif f.third and bend != STRAIGHT:
            runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, kind, True, True, bend, False)
        elif stream and (weighted or bend == STRAIGHT):
            runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, kind, True, False, bend, True)
        else:
            runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, kind, True, False, bend, False)
    elif f.third and stream:
        runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, kind, False, True, bend, True)
    elif f.third:
        runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, kind, False, True, bend, False)
    elif stream:
        runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, kind, False, False, bend, True)
    else:
        runs_as(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, k, kind, False, False, bend, False)


cdef inline void apply_runs(const char* u, Py_ssize_t su, const char* v, Py_ssize_t sv, const char* w,
                            Py_ssize_t sw, char* y, Py_ssize_t sy, Py_ssize_t runs, Py_ssize_t n, const floating* p,
                            Py_ssize_t stride, const Form* f, bint stream, int kind) noexcept nogil:
    """Scale and shift runs of n >= LANES values of a kind, each of another channel, su to sy bytes apart.

    Coefficients lie as [p, a, c, q, b][run], the first of each so many apart. Values of 16 bits have no smooth activation, no
    weights and no gate (`kind_of_results`).
    """
    if f.bend == STRAIGHT:
        runs_by(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, f, stream, kind, STRAIGHT)
    elif f.bend == CLIPPED:
        runs_by(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, f, stream, kind, CLIPPED)
    elif f.bend == BENT:
        runs_by(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, f, stream, kind, BENT)
    elif kind > DOUBLE:
        pass
    elif f.bend == SMOOTH:
        runs_by(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, f, stream, kind, SMOOTH)
    elif f.bend == WEIGHTED:
        runs_by(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, f, stream, kind, WEIGHTED)
    else:
        runs_by(u, su, v, sv, w, sw, y, sy, runs, n, p, stride, f, stream, kind, PRESENT)


cdef inline void apply_lanes(const char* u, Py_ssize_t su, const char* v, Py_ssize_t sv, const char* w, Py_ssize_t sw, char* y,
                             Py_ssize_t sy, Py_ssize_t rows, const pack* p, const pack* a, const pack* c, const pack* q,
                             const pack* b, const double* numbers, Py_ssize_t columns, Py_ssize_t width, int kind, bint pair,
                             bint third, int bend, bint stream, pack* zs) noexcept nogil:
    """Some columns of some rows, in packs of that width; zs is room for them. All are computed before the first is stored.

    With a smooth activation there is one row.
    """
    cdef Py_ssize_t j, i, r, packs = columns // width, size = size_of(kind)
    cdef pack k0 = splat(numbers[0], zs[0])
    cdef pack k1 = splat(numbers[1], zs[0])
    cdef pack k2 = splat(numbers[2], zs[0])
    if bend == SMOOTH:
        scaled_aside(<const pack*> u, <const pack*> v, <const pack*> w, p, a, c, 1, packs, k0, k1, pair, third, zs)
    for j in range(packs if bend != SMOOTH else 0):
        i = j * width * size
        for r in range(rows):
            zs[r * packs + j] = scaled(u + r * su + i, v + r * sv + i, w + r * sw + i, kind, p[j], a[j], c[j], q[j], b[j], k0,
                                       k1, k2, pair, third, bend)
    for r in range(rows):
        for j in range(packs):
            put(y + r * sy + j * width * size, kind, zs[r * packs + j], stream)


cdef inline void lanes_as(const char* u, Py_ssize_t su, const char* v, Py_ssize_t sv, const char* w,
                          Py_ssize_t sw, char* y, Py_ssize_t sy, Py_ssize_t rows, const floating* p, const floating* a,
                          const floating* c, const floating* q, const floating* b, const double* numbers,
                          Py_ssize_t columns, int kind, bint pair, bint third, int bend, bint stream) noexcept nogil:
    """LANES columns of up to TALL rows, or several times as many of one."""
    cdef vf[TALL * NF] zf
    cdef vd[TALL * ND] zd
    if floating is float:
        apply_lanes(u, su, v, sv, w, sw, y, sy, rows, <const vf*> p, <const vf*> a, <const vf*> c, <const vf*> q, <const vf*> b,
                    numbers, columns, VF, kind, pair, third, bend, stream, zf)
    else:
        apply_lanes(u, su, v, sv, w, sw, y, sy, rows, <const vd*> p, <const vd*> a, <const vd*> c, <const vd*> q, <const vd*> b,
                    numbers, columns, VD, kind, pair, third, bend, stream, zd)


cdef inline void hold(const floating* x, Py_ssize_t packs, vf* held) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(packs):
        held[j] = (<const vf*> (x + j * VF))[0]


cdef inline void held_as(const char* u, Py_ssize_t su, const char* v, Py_ssize_t sv, const char* w,
                         Py_ssize_t sw, char* y, Py_ssize_t sy, Py_ssize_t rows, const floating* p, const floating* a,
                         const floating* c, const floating* q, const floating* b, const double* numbers, Py_ssize_t columns,
                         int kind, bint pair, bint third, int bend, bint stream) noexcept nogil:
    """Rows of so many columns, whose coefficients stay in registers."""
    cdef vf[HELD * NF] ps, as_, cs, qs, bs, zs
    cdef Py_ssize_t _r, packs = columns // VF
    hold(p, packs, ps)
    hold(a, packs, as_)
    hold(c, packs, cs)
    if pair:
        hold(q, packs, qs)
        hold(b, packs, bs)
    for _r in range(rows):
        apply_lanes(u, 0, v, 0, w, 0, y, 0, 1, ps, as_, cs, qs, bs, numbers, columns, VF, kind, pair, third, bend, stream, zs)
        u += su
        v += sv
        w += sw
        y += sy


cdef inline void in_order_as(const char* u, Py_ssize_t su, const char* v, Py_ssize_t sv, const char* w,
                             Py_ssize_t sw, char* y, Py_ssize_t sy, Py_ssize_t rows, Py_ssize_t width,
                             Py_ssize_t ahead, const floating* p, const floating* a, const floating* c, const floating* q,
                             const floating* b, const double* numbers, int kind, bint pair, bint third, int bend, bint stream,
                             bint apart) noexcept nogil:
    """Rows in one loop. Where they lie apart, their places some rows ahead are fetched: what the processor fetches by itself
    ends with every row."""
    cdef Py_ssize_t i = 0, _k, end, size = size_of(kind), row = width * size, lanes = LANES * size
    for _k in range(rows * (width // LANES)):
        if apart:
            prefetch_second(u + ahead * su)
            if pair:
                prefetch_second(v + ahead * sv)
            if third:
                prefetch_second(w + ahead * sw)
            if not stream:
                prefetch_second(y + ahead * sy)
        lanes_as(u, 0, v, 0, w, 0, y, 0, 1, p + i, a + i, c + i, q + i, b + i, numbers, LANES, kind, pair, third, bend, stream)
        i += LANES
        end = -<Py_ssize_t> (i == width)  # all bits at the end of a row: arithmetic, no branch
        u += lanes + (end & (su - row))
        v += lanes + (end & (sv - row))
        w += lanes + (end & (sw - row))
        y += lanes + (end & (sy - row))
        i &= ~end


cdef inline bint held_whole(const char* u, Py_ssize_t su, const char* v, Py_ssize_t sv, const char* w,
                            Py_ssize_t sw, char* y, Py_ssize_t sy, Py_ssize_t rows, Py_ssize_t width, const floating* p,
                            const floating* a, const floating* c, const floating* q, const floating* b, const double* numbers,
                            int kind, bint pair, bint third, int bend, bint stream) noexcept nogil:
    """Rows of few columns, in the order of memory: whether they are so few that all coefficients stay in registers."""
    if ABREAST == 1 or floating is double:  # there are not enough
        return False
    if width == 4 * LANES:
        held_as(u, su, v, sv, w, sw, y, sy, rows, p, a, c, q, b, numbers, 4 * LANES, kind, pair, third, bend, stream)
    elif width == 5 * LANES:
        held_as(u, su, v, sv, w, sw, y, sy, rows, p, a, c, q, b, numbers, 5 * LANES, kind, pair, third, bend, stream)
    elif width == 6 * LANES:
        held_as(u, su, v, sv, w, sw, y, sy, rows, p, a, c, q, b, numbers, 6 * LANES, kind, pair, third, bend, stream)
    elif width == HELD * LANES:
        held_as(u, su, v, sv, w, sw, y, sy, rows, p, a, c, q, b, numbers, HELD * LANES, kind, pair, third, bend, stream)
    else:
        return False
    return True


cdef inline void rows_as(const char* u, Py_ssize_t su, const char* v, Py_ssize_t sv, const char* w,
                         Py_ssize_t sw, char* y, Py_ssize_t sy, Py_ssize_t rows, Py_ssize_t width, bint large,
                         Py_ssize_t ahead, const floating* p, const floating* a, const floating* c, const floating* q,
                         const floating* b, const double* numbers, int kind, bint pair, bint third, int bend,
                         bint stream) noexcept nogil:
    """Rows in the order of memory, in one loop or in one for each row; where coefficients are then loaded less often, some rows
    together. ahead is 0 where nothing is to be fetched."""
    # Of a smooth activation more packs than there are in LANES are worked on side by side, and memory is never waited for.
    cdef Py_ssize_t side = (1 if bend != SMOOTH else ASIDE if NF == 1 and floating is float and not pair
                            else 2 if 2 * LANES <= SIDE * <Py_ssize_t> (sizeof(vd) // sizeof(floating)) else 1)
    cdef Py_ssize_t i, k, m, r = 0, o, size = size_of(kind), columns = side * LANES
    if (bend != SMOOTH and not (large and ahead)
            and held_whole(u, su, v, sv, w, sw, y, sy, rows, width, p, a, c, q, b, numbers, kind, pair, third, bend, stream)):
        return
    # Half as many registers hold the coefficients of LANES columns. From memory that is out of order; and of one operand, and
    # with packs of 32 bytes, it is no faster.
    if ABREAST == 1 and floating is float and (pair or NF == 4) and bend != SMOOTH and not large and width < WIDE:
        while r < rows:
            m = min(<Py_ssize_t> BAND, rows - r)
            for k in range(width // LANES):
                i, o = k * LANES, k * LANES * size
                held_as(u + r * su + o, su, v + r * sv + o, sv, w + r * sw + o, sw, y + r * sy + o, sy, m, p + i, a + i, c + i,
                        q + i, b + i, numbers, LANES, kind, pair, third, bend, stream)
            r += m
        return
    while pair and bend != SMOOTH and not stream and width >= WIDE and r + TALL <= rows and not (large and ahead):
        for k in range(width // LANES):
            i, o = k * LANES, k * LANES * size
            lanes_as(u + r * su + o, su, v + r * sv + o, sv, w + r * sw + o, sw, y + r * sy + o, sy, TALL, p + i, a + i,
                     c + i, q + i, b + i, numbers, LANES, kind, pair, third, bend, stream)
        r += TALL
    if large and side == 1:
        if ahead:
            in_order_as(u, su, v, sv, w, sw, y, sy, rows, width, ahead, p, a, c, q, b, numbers, kind, pair, third, bend, stream, True)
        else:
            in_order_as(u + r * su, su, v + r * sv, sv, w + r * sw, sw, y + r * sy, sy, rows - r, width, 0, p, a, c, q, b,
                        numbers, kind, pair, third, bend, stream, False)
        return
    while r < rows:
        for k in range(width // columns):
            i, o = k * columns, k * columns * size
            lanes_as(u + r * su + o, 0, v + r * sv + o, 0, w + r * sw + o, 0, y + r * sy + o, 0, 1, p + i, a + i, c + i,
                     q + i, b + i, numbers, columns, kind, pair, third, bend, stream)
        for k in range(width % columns // LANES if side > 1 else 0):
            i, o = width - (k + 1) * LANES, (width - (k + 1) * LANES) * size
            lanes_as(u + r * su + o, 0, v + r * sv + o, 0, w + r * sw + o, 0, y + r * sy + o, 0, 1, p + i, a + i, c + i,
                     q + i, b + i, numbers, LANES, kind, pair, third, bend, stream)
        r += 1


cdef inline void rows_by(const char* u, Py_ssize_t su, const char* v, Py_ssize_t sv, const char* w,
                         Py_ssize_t sw, char* y, Py_ssize_t sy, Py_ssize_t rows, Py_ssize_t width, bint large,
                         Py_ssize_t ahead, const floating* p, const floating* a, const floating* c, const floating* q,
                         const floating* b, const Form* f, bint stream, int kind, int bend) noexcept nogil:
    """*apply* of a kind of bend, a constant where this is compiled. A gate never streams: its result is read next."""
    cdef const double* k = f.numbers
    cdef bint weighted = is_weighted(bend)
    if (f.pair or weighted) and (kind <= DOUBLE or bend == STRAIGHT):
        if f.third and weighted and stream:
            rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, kind, True, True, bend, True)
        elif f.third and bend != STRAIGHT:
            rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, kind, True, True, bend, False)
        elif stream and (weighted or bend == STRAIGHT):
            rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, kind, True, False, bend, True)
        else:
            rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, kind, True, False, bend, False)
    elif f.third and stream:
        rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, kind, False, True, bend, True)
    elif f.third:
        rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, kind, False, True, bend, False)
    elif stream:
        rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, kind, False, False, bend, True)
    else:
        rows_as(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, k, kind, False, False, bend, False)


cdef inline void apply_rows(const char* u, Py_ssize_t su, const char* v, Py_ssize_t sv, const char* w,
                            Py_ssize_t sw, char* y, Py_ssize_t sy, Py_ssize_t rows, Py_ssize_t width, bint large,
                            Py_ssize_t ahead, const floating* p, const floating* a, const floating* c, const floating* q,
                            const floating* b, const Form* f, bint stream, int kind) noexcept nogil:
    """Scale and shift rows of a kind, su to sy bytes apart, with one set of coefficients per column; the width is a multiple of
    LANES. Values of 16 bits have no smooth activation, no weights and no gate (`kind_of_results`).

    With ``stream``, every row of y is aligned to LANES values, and shares no memory with u, v and w.
    """
    if f.bend == STRAIGHT:
        rows_by(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, f, stream, kind, STRAIGHT)
    elif f.bend == CLIPPED:
        rows_by(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, f, stream, kind, CLIPPED)
    elif f.bend == BENT:
        rows_by(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, f, stream, kind, BENT)
    elif kind > DOUBLE:
        pass
    elif f.bend == SMOOTH:
        rows_by(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, f, stream, kind, SMOOTH)
    elif f.bend == WEIGHTED:
        rows_by(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, f, stream, kind, WEIGHTED)
    else:
        rows_by(u, su, v, sv, w, sw, y, sy, rows, width, large, ahead, p, a, c, q, b, f, stream, kind, PRESENT)
