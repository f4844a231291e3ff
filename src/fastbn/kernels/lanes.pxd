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

*apply* loads a pack before it stores it, so that y may be u, v or w itself and no alias check is needed. Its coefficients lie
in a table [p, a, c, q, b][channel or column], the first of each so many numbers apart.
"""
from cython cimport floating
from .activations cimport SIDE, bent, clipped, smooth
from .kinds cimport BFLOAT, DOUBLE, FLOAT, HALF, size_of
from .packs cimport (
    ABREAST, HAS_SMALL_PACKS, LANES, ND, NF, VD, VF, load_bfloat_pack, load_bytes, load_half_pack, pack, prefetch_second, select,
    smaller, splat, splat_d, splat_f, store_bfloat_pack, store_half_pack, stream_d, stream_f, vd, vf,
)
from .strips cimport (
    BENT, BYTES, CLIPPED, EACH, NO_THIRD, ONE, PRESENT, SMOOTH, STRAIGHT, WEIGHTED, Form, Loop, Strips, is_weighted, moved, of_u, of_w,
)


cdef enum:
    # How *apply* walks rows:
    IN_BANDS    # some together, where coefficients are then loaded less often,
    IN_ORDER    # all in one loop, in the order of memory,
    ROW_BY_ROW  # or in one for each


cdef enum:
    ASIDE = 4  # packs with a smooth activation that are worked on side by side
    WIDE = 512  # columns; the coefficients of so many are loaded once
    TALL = 4  # for so many rows,
    BAND = 8  # and of fewer columns for so many
    VAST = 1024  # columns; of more, two rows are taken together where all others are taken one by one
    HELD = 8  # times LANES columns of a row at most that need no loop
    NUMBERS = 8  # of a pack: its coefficients and those of the activation


cdef inline pack counted(pack u, pack v, pack w, const pack* k, bint frozen) noexcept nogil:
    """The gradient (u + w * ((v - q) * b + c)) * a of weighted statistics; 0 where v is missing.

    Missing is what has no weight and is not finite. What has none is selected out, never multiplied. a is NaN where a NaN
    counted.
    """
    cdef pack a = k[1], c = k[2], q = k[3], b = k[4], kept = k[5]
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


cdef inline pack straight(pack x, pack w, const pack* k, bint third) noexcept nogil:
    """What comes before an activation."""
    cdef pack z = (x - k[0]) * k[1] + k[2]
    return z + w if third else z


cdef inline pack scaled(const Strips* x, Py_ssize_t i, const pack* k, Loop f) noexcept nogil:
    """The formula of *apply*, the only place where it stands, of the pack i bytes on; k are p, a, c, q, b and three numbers."""
    cdef pack u = fetch(x.u + of_u(i, f.kind_u, f.kind), f.kind_u, k[0])
    cdef pack v = fetch(x.v + i, f.kind, k[0]) if f.pair else u
    cdef pack w = splat(1, u)
    cdef pack z
    if f.third == ONE:
        w = splat((<const float*> x.w)[0] if pack is vf else (<const double*> x.w)[0], u)
    elif f.third == BYTES:
        w = smaller(load_bytes(x.w + of_w(i, BYTES, f.kind), u), k[6])
    elif f.third == EACH:
        w = fetch(x.w + i, f.kind, k[0])
    if is_weighted(f.bend):
        return counted(u, v, w, k, f.bend == PRESENT)
    if f.pair and f.bend == STRAIGHT:
        return ((u - k[0]) + ((v - k[3]) * k[4] + k[2])) * k[1]
    z = straight(v, w, k, f.third)
    if f.bend == CLIPPED:
        return clipped(z, k[5], k[6], u, f.pair)
    if f.bend == BENT:
        return bent(z, k[5], u, f.pair)
    if f.bend == SMOOTH:
        smooth(&z, &u, 1, k[5], k[6], f.pair)
    return z


cdef inline void scaled_aside(const Strips* x, Py_ssize_t i, const pack* k, Py_ssize_t apart, Py_ssize_t count, Loop f,
                              pack* zs) noexcept nogil:
    """`scaled` of neighbouring packs with a smooth activation, from i bytes on; the numbers of each are so far apart."""
    cdef Py_ssize_t j, step = (VF if pack is vf else VD) * size_of(f.kind)
    cdef pack u[SIDE]
    for j in range(count):
        zs[j] = straight(fetch((x.v if f.pair else x.u) + i + j * step, f.kind, k[0]),
                         fetch(x.w + i + j * step, f.kind, k[0]) if f.third else k[0], k + j * apart, f.third)
        if f.pair:
            u[j] = fetch(x.u + of_u(i + j * step, f.kind_u, f.kind), f.kind_u, k[0])
    smooth(zs, u, count, k[5], k[6], f.pair)


cdef inline void set_numbers(const Form* form, pack* k) noexcept nogil:
    """Those of the activation, behind the coefficients of a pack."""
    cdef Py_ssize_t j
    for j in range(3):
        k[5 + j] = splat(form.numbers[j], k[0])


cdef inline void apply_run(const Strips* x, const pack* k, Py_ssize_t width, Loop f) noexcept nogil:
    """A run of at least a pack of that width, in packs, the second from where y is aligned to packs, unless they are costly.

    So the first pack overlaps the second, and the last the one before: every pack is computed before the one that precedes
    it is stored, and y may be u, v or w. What is stored past the caches is aligned.
    """
    cdef Py_ssize_t _k, j, size = size_of(f.kind)
    cdef Py_ssize_t i = 0, step = width * size  # bytes, and so is what follows
    cdef Py_ssize_t end = (x.length - width) * size
    cdef pack z = scaled(x, 0, k, f)
    cdef pack after
    cdef pack zs[ASIDE]
    if not f.stream and f.bend != SMOOTH:
        i = (width - <Py_ssize_t> (<size_t> x.y // size % <size_t> width)) % width * size
        if end < step:  # else the last would overlap the first as well
            i = 0
        if i:
            after = scaled(x, i, k, f)
            put(x.y, f.kind, z, False)
            z = after
    if f.bend == SMOOTH:
        for _k in range((end // step) // ASIDE):
            scaled_aside(x, i + step, k, 0, ASIDE, f, zs)
            put(x.y + i, f.kind, z, f.stream)
            for j in range(ASIDE - 1):
                put(x.y + i + (j + 1) * step, f.kind, zs[j], f.stream)
            z = zs[ASIDE - 1]
            i = i + ASIDE * step
    for _k in range((end - i) // step):
        after = scaled(x, i + step, k, f)
        put(x.y + i, f.kind, z, f.stream)
        z = after
        i = i + step
    if i < end:
        after = scaled(x, end, k, f)
        put(x.y + i, f.kind, z, f.stream)
        put(x.y + end, f.kind, after, False)
    else:
        put(x.y + i, f.kind, z, f.stream)


cdef inline void runs_as(const Strips* given, const floating* table, Py_ssize_t stride, const Form* form,
                         Loop f) noexcept nogil:
    """Runs, each of another channel."""
    cdef Strips x = given[0]
    cdef vf[NUMBERS] kf
    cdef vd[NUMBERS] kd
    cdef Py_ssize_t r, j
    if floating is float:
        set_numbers(form, kf)
    else:
        set_numbers(form, kd)
    for r in range(given.count):
        for j in range(5 if f.pair else 3):
            if floating is float:
                kf[j] = splat_f(table[j * stride + r])
            else:
                kd[j] = splat_d(table[j * stride + r])
        if floating is float:
            apply_run(&x, kf, VF, f)
        else:
            apply_run(&x, kd, VD, f)
        x = moved(&x, 1, 0, f.kind_u, f.kind)


cdef inline void load_coefficients(const floating* table, Py_ssize_t stride, pack* k, bint pair) noexcept nogil:
    """Those of a pack of columns; the last two are a second operand's."""
    cdef Py_ssize_t j
    for j in range(5 if pair else 3):
        k[j] = (<const pack*> (table + j * stride))[0]


cdef inline void apply_columns(const Strips* x, Py_ssize_t columns, const floating* table, Py_ssize_t stride, pack* k,
                               Py_ssize_t width, Loop f) noexcept nogil:
    """The first columns of the first row, in packs of that width."""
    cdef Py_ssize_t j, packs = columns // width, step = width * size_of(f.kind)
    cdef pack zs[SIDE]
    cdef pack ks[SIDE * NUMBERS]
    for j in range(packs):
        if f.bend == SMOOTH:
            load_coefficients(table + j * width, stride, ks + j * NUMBERS, f.pair)
        else:
            load_coefficients(table + j * width, stride, k, f.pair)
            put(x.y + j * step, f.kind, scaled(x, j * step, k, f), f.stream)
    if f.bend == SMOOTH:
        ks[5], ks[6] = k[5], k[6]
        scaled_aside(x, 0, ks, NUMBERS, packs, f, zs)
        for j in range(packs):
            put(x.y + j * step, f.kind, zs[j], f.stream)


cdef inline void columns_as(const Strips* x, Py_ssize_t columns, const floating* table, Py_ssize_t stride, vf* kf, vd* kd,
                            Loop f) noexcept nogil:
    """The same, of either type."""
    if floating is float:
        apply_columns(x, columns, table, stride, kf, VF, f)
    else:
        apply_columns(x, columns, table, stride, kd, VD, f)


cdef inline void hold_columns(const Strips* given, Py_ssize_t rows, Py_ssize_t columns, const floating* table,
                              Py_ssize_t stride, const pack* numbers, Py_ssize_t width, pack* held, Loop f) noexcept nogil:
    """So many columns of rows, whose coefficients stay in registers. With no smooth activation."""
    cdef Strips x = given[0]
    cdef Py_ssize_t _r, i, j, packs = columns // width, step = width * size_of(f.kind)
    for j in range(packs):
        load_coefficients(table + j * width, stride, held + j * NUMBERS, f.pair)
        for i in range(5, NUMBERS):
            held[j * NUMBERS + i] = numbers[i]
    for _r in range(rows):
        for j in range(packs):
            put(x.y + j * step, f.kind, scaled(&x, j * step, held + j * NUMBERS, f), f.stream)
        x = moved(&x, 1, 0, f.kind_u, f.kind)


cdef inline void held_as(const Strips* x, Py_ssize_t rows, Py_ssize_t columns, const floating* table, Py_ssize_t stride,
                         const vf* kf, const vd* kd, Loop f) noexcept nogil:
    """The same, of either type."""
    cdef vf[HELD * NF * NUMBERS] held
    cdef vd[ND * NUMBERS] wide
    if floating is float:
        hold_columns(x, rows, columns, table, stride, kf, VF, held, f)
    else:
        hold_columns(x, rows, columns, table, stride, kd, VD, wide, f)


cdef inline bint held_whole(const Strips* x, const floating* table, Py_ssize_t stride, const vf* kf, const vd* kd,
                            Loop f) noexcept nogil:
    """Rows of few columns, in the order of memory: whether they are so few that a row needs no loop.

    Where there are no registers for all coefficients they are read from the stack, side by side: 0.83 to 0.98 times.
    """
    if floating is double or ABREAST == 1 and f.bend == PRESENT:
        return False
    if x.length == 4 * LANES:
        held_as(x, x.count, 4 * LANES, table, stride, kf, kd, f)
    elif x.length == 5 * LANES:
        held_as(x, x.count, 5 * LANES, table, stride, kf, kd, f)
    elif x.length == 6 * LANES:
        held_as(x, x.count, 6 * LANES, table, stride, kf, kd, f)
    elif x.length == 7 * LANES:
        held_as(x, x.count, 7 * LANES, table, stride, kf, kd, f)
    elif NF == 2 and x.length == HELD * LANES:
        held_as(x, x.count, HELD * LANES, table, stride, kf, kd, f)
    else:
        return False
    return True


cdef inline void in_order_as(const Strips* given, Py_ssize_t ahead, const floating* table, Py_ssize_t stride, vf* kf, vd* kd,
                             Loop f, bint apart) noexcept nogil:
    """Rows in one loop. Where they lie apart, their places some rows ahead are fetched: what the processor fetches by itself
    ends with every row."""
    cdef Strips x = given[0]
    cdef Py_ssize_t i = 0, _k, end, size = size_of(f.kind), row = x.length * size, lanes = LANES * size
    for _k in range(x.count * (x.length // LANES)):
        if apart:
            prefetch_second(x.u + ahead * x.su)
            if f.pair:
                prefetch_second(x.v + ahead * x.sv)
            if f.third:
                prefetch_second(x.w + ahead * x.sw)
            if not f.stream:
                prefetch_second(x.y + ahead * x.sy)
        columns_as(&x, LANES, table + i, stride, kf, kd, f)
        i += LANES
        end = -<Py_ssize_t> (i == x.length)  # all bits at the end of a row: arithmetic, no branch
        x.u += of_u(lanes, f.kind_u, f.kind) + (end & (x.su - of_u(row, f.kind_u, f.kind)))
        x.v += lanes + (end & (x.sv - row))
        x.w += of_w(lanes, f.third, f.kind) + (end & (x.sw - of_w(row, f.third, f.kind)))
        x.y += lanes + (end & (x.sy - row))
        i &= ~end


cdef inline void rows_as(const Strips* given, int walk, Py_ssize_t ahead, const floating* table, Py_ssize_t stride,
                         const Form* form, Loop f) noexcept nogil:
    """Rows, walked as is said; ahead is 0 where nothing is to be fetched."""
    # Of a smooth activation more packs than there are in LANES are worked on side by side, and memory is never waited for.
    cdef Py_ssize_t side = (1 if f.bend != SMOOTH else ASIDE if NF == 1 and floating is float and not f.pair
                            else 2 if 2 * LANES <= SIDE * <Py_ssize_t> (sizeof(vd) // sizeof(floating)) else 1)
    cdef Py_ssize_t _r, i, k, r = 0, band = 0, size = size_of(f.kind), columns = side * LANES
    cdef bint apart = walk == IN_ORDER and ahead > 0
    cdef Strips x = given[0], at
    x.third = f.third  # a constant
    cdef vf[NUMBERS] kf
    cdef vd[NUMBERS] kd
    if floating is float:
        set_numbers(form, kf)
    else:
        set_numbers(form, kd)
    if f.bend != SMOOTH and not apart and held_whole(&x, table, stride, kf, kd, f):
        return
    # Half as many registers hold the coefficients of LANES columns. From memory that is out of order; and of one operand, and
    # with packs of 32 bytes, it is no faster.
    if ABREAST == 1 and floating is float and (f.pair or NF == 4) and f.bend != SMOOTH and walk == IN_BANDS and x.length < WIDE:
        band = BAND
    elif f.pair and f.bend != SMOOTH and not f.stream and not apart:
        if walk != ROW_BY_ROW and x.length >= WIDE:
            band = TALL
        elif walk == ROW_BY_ROW and x.length > VAST and floating is float:
            band = 2
    if band:
        while r < x.count:
            for k in range(x.length // LANES):
                at = moved(&x, r, k * LANES * size, f.kind_u, f.kind)
                held_as(&at, min(band, x.count - r), LANES, table + k * LANES, stride, kf, kd, f)
            r += band
    elif walk == IN_ORDER and side == 1:
        if apart:
            in_order_as(&x, ahead, table, stride, kf, kd, f, True)
        else:
            in_order_as(&x, 0, table, stride, kf, kd, f, False)
    else:
        for _r in range(x.count):
            for k in range(x.length // columns):
                at = moved(&x, 0, k * columns * size, f.kind_u, f.kind)
                columns_as(&at, columns, table + k * columns, stride, kf, kd, f)
            for k in range(x.length % columns // LANES if side > 1 else 0):
                i = x.length - (k + 1) * LANES
                at = moved(&x, 0, i * size, f.kind_u, f.kind)
                columns_as(&at, LANES, table + i, stride, kf, kd, f)
            x = moved(&x, 1, 0, f.kind_u, f.kind)


cdef inline void strips_as(const Strips* x, bint are_rows, int walk, Py_ssize_t ahead, const floating* table,
                           Py_ssize_t stride, const Form* form, Loop f) noexcept nogil:
    if are_rows:
        rows_as(x, walk, ahead, table, stride, form, f)
    else:
        runs_as(x, table, stride, form, f)


cdef inline void strips_to(const Strips* x, bint are_rows, int walk, Py_ssize_t ahead, const floating* table,
                           Py_ssize_t stride, const Form* f, bint stream, int kind_u, int kind, bint pair, int third,
                           int bend) noexcept nogil:
    """*apply* of constants, past the caches or not."""
    if stream:
        strips_as(x, are_rows, walk, ahead, table, stride, f, Loop(kind_u, kind, pair, third, bend, True))
    else:
        strips_as(x, are_rows, walk, ahead, table, stride, f, Loop(kind_u, kind, pair, third, bend, False))


cdef inline void strips_by(const Strips* x, bint are_rows, int walk, Py_ssize_t ahead, const floating* table,
                           Py_ssize_t stride, const Form* f, bint stream, int kind_u, int kind, int bend) noexcept nogil:
    """*apply* of kinds and a kind of bend, constants where this is compiled. A gate never streams: its result is read next."""
    cdef bint weighted = is_weighted(bend)
    if (f.pair or weighted or kind_u != kind) and (kind <= DOUBLE or bend == STRAIGHT):
        if weighted and are_rows and x.third == ONE:
            strips_to(x, are_rows, walk, ahead, table, stride, f, stream, kind_u, kind, True, ONE, bend)
        elif weighted and are_rows and x.third == BYTES:
            strips_to(x, are_rows, walk, ahead, table, stride, f, stream, kind_u, kind, True, BYTES, bend)
        elif weighted and f.third:
            strips_to(x, are_rows, walk, ahead, table, stride, f, stream, kind_u, kind, True, EACH, bend)
        elif weighted or bend == STRAIGHT:
            strips_to(x, are_rows, walk, ahead, table, stride, f, stream, kind_u, kind, True, NO_THIRD, bend)
        elif f.third:
            strips_to(x, are_rows, walk, ahead, table, stride, f, False, kind_u, kind, True, EACH, bend)
        else:
            strips_to(x, are_rows, walk, ahead, table, stride, f, False, kind_u, kind, True, NO_THIRD, bend)
    elif f.third:
        strips_to(x, are_rows, walk, ahead, table, stride, f, stream, kind_u, kind, False, EACH, bend)
    else:
        strips_to(x, are_rows, walk, ahead, table, stride, f, stream, kind_u, kind, False, NO_THIRD, bend)


cdef inline void strips_of_kind(const Strips* x, bint are_rows, int walk, Py_ssize_t ahead, const floating* table,
                                Py_ssize_t stride, const Form* f, bint stream, int bend) noexcept nogil:
    """*apply* of a kind of bend, a constant where this is compiled.

    Kinds are those of `kind_of_results` and `kind_beside`: all alike, or those of a gradient of 16 bits behind a smooth
    activation: dy that comes through the gate, or has done so.
    """
    if floating is double or not HAS_SMALL_PACKS or bend > SMOOTH or (x.kind == FLOAT and x.kind_u == FLOAT):
        strips_by(x, are_rows, walk, ahead, table, stride, f, stream, FLOAT if floating is float else DOUBLE,
                  FLOAT if floating is float else DOUBLE, bend)
    elif x.kind == HALF and x.kind_u == HALF:
        strips_by(x, are_rows, walk, ahead, table, stride, f, stream, HALF, HALF, bend)
    elif x.kind == BFLOAT and x.kind_u == BFLOAT:
        strips_by(x, are_rows, walk, ahead, table, stride, f, stream, BFLOAT, BFLOAT, bend)
    elif bend == STRAIGHT and x.kind == HALF:
        strips_by(x, are_rows, walk, ahead, table, stride, f, stream, FLOAT, HALF, bend)
    elif bend == STRAIGHT:
        strips_by(x, are_rows, walk, ahead, table, stride, f, stream, FLOAT, BFLOAT, bend)
    elif bend == SMOOTH and x.kind_u == HALF:
        strips_by(x, are_rows, walk, ahead, table, stride, f, stream, HALF, FLOAT, bend)
    elif bend == SMOOTH:
        strips_by(x, are_rows, walk, ahead, table, stride, f, stream, BFLOAT, FLOAT, bend)


cdef inline void apply_runs(const Strips* x, const floating* table, Py_ssize_t stride, const Form* f,
                            bint stream) noexcept nogil:
    """Scale and shift runs of at least LANES values, each of another channel."""
    if f.bend == STRAIGHT:
        strips_of_kind(x, False, IN_BANDS, 0, table, stride, f, stream, STRAIGHT)
    elif f.bend == CLIPPED:
        strips_of_kind(x, False, IN_BANDS, 0, table, stride, f, stream, CLIPPED)
    elif f.bend == BENT:
        strips_of_kind(x, False, IN_BANDS, 0, table, stride, f, stream, BENT)
    elif f.bend == SMOOTH:
        strips_of_kind(x, False, IN_BANDS, 0, table, stride, f, stream, SMOOTH)
    elif f.bend == WEIGHTED:
        strips_of_kind(x, False, IN_BANDS, 0, table, stride, f, stream, WEIGHTED)
    else:
        strips_of_kind(x, False, IN_BANDS, 0, table, stride, f, stream, PRESENT)


cdef inline void apply_rows(const Strips* x, int walk, Py_ssize_t ahead, const floating* table, Py_ssize_t stride,
                            const Form* f, bint stream, int bend) noexcept nogil:
    """Scale and shift rows, with one set of coefficients per column; of a kind of bend, a constant where this is compiled.
    The length is a multiple of LANES.

    With ``stream``, every row of y is aligned to LANES values, and shares no memory with u, v and w.
    """
    strips_of_kind(x, True, walk, ahead, table, stride, f, stream, bend)
