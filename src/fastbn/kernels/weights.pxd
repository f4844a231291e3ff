"""Values that do not all count alike: sums of weighted, masked or missing values.

    total += w,   first += w * (x - p),   second += w * (x - p) * (x - p)
    first += u,   second += u * (v - q)         the gradient, over all values that are not missing

w is a weight, 0 or more, given for each value or for a whole run or row. Of a mask, and where NaN
is missing, w is 0 or 1: then x - p is 0 in the plain sums where a value does not count (marks.pxd), and what counts is
counted. In the gradient what has no weight and is not finite is missing; what has none and is finite got a y, so its dy
counts.

Values of weight 0 do no harm, NaN and inf neither: they are left out. While everything is finite a product with 0 comes to
the same, to the bit; so a part with weights is first summed as it is, and again if its sums are not finite, staged
(`choose`). The gradient's first sums are the plain ones, unless NaN is missing; where there are weights too, what is
missing is left out of them staged (`hide`).

Accuracy     a part is summed as it is (p = 0); where its mean is large beside its deviation it is summed again relative to
             its mean. Products of two float32 values are exact in float64, others are rounded and never fused. No value
             decides about the shift: neither an outlier of weight 0 nor a missing first value can spoil it.
Merge        by Chan's formula with sums of weights for counts; parts without weight are passed over.
Check        the largest bits of weights are kept for each lane while they are summed (`look_at`), for those that nobody looked
             at before; of what is staged, they are looked at before they change (`largest_of`).
"""
from cython cimport floating
from libc.math cimport isfinite
from libc.stdint cimport int32_t, int64_t

from .caches cimport is_roomy
from .given_weights cimport mark, weight
from .moments cimport CANCELLED
from .packs cimport (
    ABREAST, LANES, ND, NF, VD, VF, add_by_product, add_exact_product, larger_bits_d, larger_bits_f, largest_d, largest_f, last_masks, masked, prefetch, prefetch_once, splat_d, vd, widen,
)
from .sums cimport later, pitch


# -- what is staged: plain loops, which compilers vectorize; nothing in them is rounded -------------------------------


cdef inline void choose(const floating* x, weight* w, Py_ssize_t n, const floating* pad, Py_ssize_t next_pad, bint omits,
                        floating* y) noexcept nogil:
    """n values to y, pad (of which the next is that far on) where they do not count; missing NaN loses its weight."""
    cdef Py_ssize_t i
    cdef floating v
    for i in range(n):
        v = x[i]
        if omits:
            w[i] = w[i] if v == v else 0
        y[i] = v if w[i] > 0 else pad[i * next_pad]


cdef inline void hide_as(const floating* u, const floating* v, const weight* w, Py_ssize_t n, bint weighted, bint omits,
                         floating* hidden_u, floating* hidden_v) noexcept nogil:
    """n pairs of the gradient, 0 where v is missing."""
    cdef Py_ssize_t i
    cdef int32_t missing
    cdef floating x, y
    for i in range(n):
        x = u[i]
        y = v[i]
        missing = 0
        if weighted:
            missing = (w[i] == 0) & (not y - y == 0)
        if omits:
            missing |= y != y
        hidden_u[i] = 0 if missing else x
        hidden_v[i] = 0 if missing else y


cdef inline void hide(const floating* u, const floating* v, const weight* w, Py_ssize_t n, bint omits, floating* hidden_u,
                      floating* hidden_v) noexcept nogil:
    """The same; w is NULL where there are no weights."""
    if w == NULL:
        hide_as(u, v, w, n, False, True, hidden_u, hidden_v)
    elif omits:
        hide_as(u, v, w, n, True, True, hidden_u, hidden_v)
    else:
        hide_as(u, v, w, n, True, False, hidden_u, hidden_v)


cdef inline double largest_of(const char* w, Py_ssize_t n, bint wide) noexcept nogil:
    """The largest of n doubles or floats; NaN where one of them is negative, -0.0, infinite or NaN."""
    return largest_d(<const double*> w, n) if wide else largest_f(<const float*> w, n)


cdef inline double largest_in(const double* most, bint wide) noexcept nogil:
    """The largest weight of those whose bits `look_at` kept."""
    return largest_of(<const char*> most, LANES if wide else 2 * LANES, wide)


cdef inline double larger(double a, double b) noexcept nogil:
    """The larger one; NaN where one is."""
    return a if a != a or b <= a else b


cdef inline bint fits(double most) noexcept nogil:
    """Whether weights up to that one can be summed as they are: sums of others could leave the range of the data's type."""
    return most == 0 or (most >= 2.0**-40 and most <= 2.0**40)


# -- sums with weights -------------------------------------------------------------------------------------------------


cdef inline void add_weighted(vd* r, vd* s, vd* t, vd w, vd x, bint exact, bint counts) noexcept nogil:
    """The formula, the only place where it stands; x is relative to the shift already.

    What is exact is fused: on some processors that is another unit than the one that adds.
    """
    cdef vd weighted = w * x
    if counts:
        r[0] = add_by_product(r[0], w)
    if exact:
        s[0] = add_exact_product(s[0], w, x)
    else:
        s[0] = s[0] + weighted
    t[0] = t[0] + weighted * x


cdef inline vd weight_pack(const char* w, Py_ssize_t i, bint wide) noexcept nogil:
    if wide:
        return widen(<const double*> w + i)
    return widen(<const float*> w + i)


cdef inline void load_largest(vd* largest, const double* most) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(ND):
        largest[j] = (<const vd*> most)[j]


cdef inline void store_largest(const vd* largest, double* most) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(ND):
        (<vd*> most)[j] = largest[j]


cdef inline void look_at(vd* largest, const char* w, Py_ssize_t i, bint wide, bint shifted) noexcept nogil:
    """Keep the largest bits of LANES weights, the first time: as floats they fill half of the packs."""
    cdef Py_ssize_t j
    if shifted:
        return
    if wide:
        for j in range(ND):
            largest[j] = larger_bits_d(largest[j], <const double*> w + i + j * VD)
    else:
        for j in range(NF):
            largest[j] = larger_bits_f(largest[j], <const float*> w + i + j * VF)


cdef inline void weigh_abreast(const floating* u, Py_ssize_t cu, Py_ssize_t su, const char* w, Py_ssize_t cw, Py_ssize_t sw,
                               double one, Py_ssize_t channels, Py_ssize_t runs, Py_ssize_t n, const double* p, bint each,
                               bint wide, bint shifted, bint counts, Py_ssize_t next_u, Py_ssize_t next_w, double* total,
                               double* first, double* second, double* most) noexcept nogil:
    """`weigh_runs` of as many channels as have their sums side by side in registers, ABREAST at most."""
    cdef vd r[ABREAST * ND]
    cdef vd s[ABREAST * ND]
    cdef vd t[ABREAST * ND]
    cdef vd ps[ABREAST]
    cdef vd largest[ND]
    cdef vd du, dw
    cdef vd ws = splat_d(one)
    cdef bint exact = floating is float and not wide and not shifted
    cdef Py_ssize_t size = 8 if wide else 4
    cdef Py_ssize_t c, i, j, k, _r, rest = n % LANES
    cdef const int64_t* mask = last_masks + rest
    # Weights that are read once need not push others out of the caches. Where the last level holds what no core has, they would
    # be in neither after that (32 x 256 x 28 x 28: 4.0 and 2.2 ms).
    cdef bint once = cw != 0 and not is_roomy()
    for c in range(channels):
        ps[c] = splat_d(p[c])
        for j in range(ND):
            r[c * ND + j] = (<vd*> (total + c * LANES))[j]
            s[c * ND + j] = (<vd*> (first + c * LANES))[j]
            t[c * ND + j] = (<vd*> (second + c * LANES))[j]
    load_largest(largest, most)
    for _r in range(runs):
        for k in range(n // LANES):
            i = k * LANES
            for c in range(channels):
                prefetch(u + c * cu + next_u + i)
                if each:
                    if once:
                        prefetch_once(w + c * cw + next_w + i * size)
                    else:
                        prefetch(w + c * cw + next_w + i * size)
                    look_at(largest, w + c * cw, i, wide, shifted)
                for j in range(ND):
                    dw = weight_pack(w + c * cw, i + j * VD, wide) if each else ws
                    du = widen(u + c * cu + i + j * VD)
                    add_weighted(r + c * ND + j, s + c * ND + j, t + c * ND + j, dw, du - ps[c] if shifted else du, exact, counts)
        if rest:  # what was added already has no weight, and is 0
            i = n - LANES
            for c in range(channels):
                if each:
                    look_at(largest, w + c * cw, i, wide, shifted)
                for j in range(ND):
                    if (j + 1) * VD > LANES - rest:
                        dw = masked(weight_pack(w + c * cw, i + j * VD, wide) if each else ws, mask + j * VD)
                        du = widen(u + c * cu + i + j * VD)
                        du = masked(du - ps[c] if shifted else du, mask + j * VD)
                        add_weighted(r + c * ND + j, s + c * ND + j, t + c * ND + j, dw, du, exact, counts)
        u += su
        w += sw
    for c in range(channels):
        for j in range(ND):
            (<vd*> (total + c * LANES))[j] = r[c * ND + j]
            (<vd*> (first + c * LANES))[j] = s[c * ND + j]
            (<vd*> (second + c * LANES))[j] = t[c * ND + j]
    store_largest(largest, most)


cdef inline void weigh_runs_as(const floating* u, Py_ssize_t cu, Py_ssize_t su, const char* w, Py_ssize_t cw, Py_ssize_t sw,
                               double one, Py_ssize_t channels, Py_ssize_t runs, Py_ssize_t n, const double* p, bint each,
                               bint wide, bint shifted, bint counts, bint abreast, Py_ssize_t next_u, Py_ssize_t next_w,
                               double* total, double* first, double* second, double* most) noexcept nogil:
    cdef Py_ssize_t c = 0
    while ABREAST > 1 and abreast and c + ABREAST <= channels:
        weigh_abreast(u + c * cu, cu, su, w + c * cw, cw, sw, one, ABREAST, runs, n, p + c, each, wide, shifted, counts,
                      next_u, next_w, total + c * LANES, first + c * LANES, second + c * LANES, most)
        c += ABREAST
    while c < channels:
        weigh_abreast(u + c * cu, cu, su, w + c * cw, cw, sw, one, 1, runs, n, p + c, each, wide, shifted, counts, next_u,
                      next_w, total + c * LANES, first + c * LANES, second + c * LANES, most)
        c += 1


cdef inline void weigh_columns(const floating* u, Py_ssize_t su, const char* w, Py_ssize_t sw, const Py_ssize_t* chosen,
                               Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, Py_ssize_t k, Py_ssize_t count,
                               const double* p, bint each, bint wide, bint shifted, double* total, double* first,
                               double* second, double* most) noexcept nogil:
    """`weigh_rows` of so many times LANES columns, ABREAST at most, from the k-th on: their sums are side by side."""
    cdef vd r[ABREAST * ND]
    cdef vd s[ABREAST * ND]
    cdef vd t[ABREAST * ND]
    cdef vd ps[ABREAST * ND]
    cdef vd largest[ND]
    cdef vd du, dw
    cdef bint exact = floating is float and not wide and not shifted
    cdef Py_ssize_t size = 8 if wide else 4
    cdef Py_ssize_t i = k * LANES, c, j, n, row, pu = pitch(su, width, count), pw = pitch(sw, width, count) * size
    cdef const floating* next_u = later(u, su, rows, ahead, width, k)
    cdef const char* next_w = w
    if each:
        if wide:
            next_w = <const char*> later(<const double*> w, sw, rows, ahead, width, k)
        else:
            next_w = <const char*> later(<const float*> w, sw, rows, ahead, width, k)
        load_largest(largest, most)
    for j in range(count * ND):
        if each:
            r[j] = (<vd*> (total + i))[j]
        s[j] = (<vd*> (first + i))[j]
        t[j] = (<vd*> (second + i))[j]
        ps[j] = (<vd*> (p + i))[j]
    for n in range(rows):
        row = n
        if not each:
            row = chosen[n]
            dw = splat_d((<const double*> w)[n])
        for c in range(count):
            prefetch(next_u + n * pu + c * LANES)
            if each:
                prefetch(next_w + n * pw + c * LANES * size)
                look_at(largest, w, row * sw + i + c * LANES, wide, shifted)
        for j in range(count * ND):
            if each:
                dw = weight_pack(w, row * sw + i + j * VD, wide)
            du = widen(u + row * su + i + j * VD)
            add_weighted(r + j, s + j, t + j, dw, du - ps[j] if shifted else du, exact, each)
    for j in range(count * ND):
        if each:
            (<vd*> (total + i))[j] = r[j]
        (<vd*> (first + i))[j] = s[j]
        (<vd*> (second + i))[j] = t[j]
    if each:
        store_largest(largest, most)


cdef inline void weigh_rows_as(const floating* u, Py_ssize_t su, const char* w, Py_ssize_t sw, const Py_ssize_t* chosen,
                               Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, const double* p, bint each, bint wide,
                               bint shifted, double* total, double* first, double* second, double* most) noexcept nogil:
    """Add rows to one set of sums per column; see `reduce_rows`.

    The width is a multiple of LANES. Each value has a weight, and sw is the distance between rows of them; or each row has
    one, a double: then those rows are added that are chosen, and the total is left alone.
    """
    cdef Py_ssize_t k = 0, end = width // LANES
    while ABREAST > 1 and k + ABREAST <= end:
        weigh_columns(u, su, w, sw, chosen, rows, ahead, width, k, ABREAST, p, each, wide, shifted, total, first, second, most)
        k += ABREAST
    while k < end:
        weigh_columns(u, su, w, sw, chosen, rows, ahead, width, k, 1, p, each, wide, shifted, total, first, second, most)
        k += 1


# What is constant there is decided one after the other.


cdef inline void weigh_runs_to(const floating* u, Py_ssize_t cu, Py_ssize_t su, const char* w, Py_ssize_t cw, Py_ssize_t sw,
                               double one, Py_ssize_t channels, Py_ssize_t runs, Py_ssize_t n, const double* p, bint each,
                               bint wide, bint shifted, bint counts, bint abreast, Py_ssize_t next_u, Py_ssize_t next_w,
                               double* total, double* first, double* second, double* most) noexcept nogil:
    if counts:
        weigh_runs_as(u, cu, su, w, cw, sw, one, channels, runs, n, p, each, wide, shifted, True, abreast, next_u, next_w,
                      total, first, second, most)
    else:
        weigh_runs_as(u, cu, su, w, cw, sw, one, channels, runs, n, p, each, wide, shifted, False, abreast, next_u, next_w,
                      total, first, second, most)


cdef inline void weigh_runs_by(const floating* u, Py_ssize_t cu, Py_ssize_t su, const char* w, Py_ssize_t cw, Py_ssize_t sw,
                               double one, Py_ssize_t channels, Py_ssize_t runs, Py_ssize_t n, const double* p, bint each,
                               bint wide, bint shifted, bint counts, bint abreast, Py_ssize_t next_u, Py_ssize_t next_w,
                               double* total, double* first, double* second, double* most) noexcept nogil:
    if shifted:
        weigh_runs_to(u, cu, su, w, cw, sw, one, channels, runs, n, p, each, wide, True, counts, abreast, next_u, next_w,
                      total, first, second, most)
    else:
        weigh_runs_to(u, cu, su, w, cw, sw, one, channels, runs, n, p, each, wide, False, counts, abreast, next_u, next_w,
                      total, first, second, most)


cdef inline void weigh_runs(const floating* u, Py_ssize_t cu, Py_ssize_t su, const char* w, Py_ssize_t cw, Py_ssize_t sw,
                            double one, Py_ssize_t channels, Py_ssize_t runs, Py_ssize_t n, const double* p, bint each,
                            bint wide, bint shifted, bint counts, bint abreast, Py_ssize_t next_u, Py_ssize_t next_w,
                            double* total, double* first, double* second, double* most) noexcept nogil:
    """Add runs of n >= LANES values of each channel to its LANES sets of sums; see `reduce_runs`.

    Values have a weight each, double where they are wide, else float; or all the same one. cu values and cw bytes lie
    between one channel and the next, su and sw between runs. Channels have totals of their own, or, where the weights are
    not counted, none.
    """
    if not each:  # it may be a double
        weigh_runs_by(u, cu, su, w, cw, sw, one, channels, runs, n, p, False, True, shifted, counts, abreast, next_u, next_w,
                      total, first, second, most)
    elif wide:
        weigh_runs_by(u, cu, su, w, cw, sw, one, channels, runs, n, p, True, True, shifted, counts, abreast, next_u, next_w,
                      total, first, second, most)
    else:
        weigh_runs_by(u, cu, su, w, cw, sw, one, channels, runs, n, p, True, False, shifted, counts, abreast, next_u, next_w,
                      total, first, second, most)


cdef inline void weigh_rows_by(const floating* u, Py_ssize_t su, const char* w, Py_ssize_t sw, const Py_ssize_t* chosen,
                               Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, const double* p, bint each, bint wide,
                               bint shifted, double* total, double* first, double* second, double* most) noexcept nogil:
    if shifted:
        weigh_rows_as(u, su, w, sw, chosen, rows, ahead, width, p, each, wide, True, total, first, second, most)
    else:
        weigh_rows_as(u, su, w, sw, chosen, rows, ahead, width, p, each, wide, False, total, first, second, most)


cdef inline void weigh_rows(const floating* u, Py_ssize_t su, const char* w, Py_ssize_t sw, const Py_ssize_t* chosen,
                            Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, const double* p, bint each, bint wide,
                            bint shifted, double* total, double* first, double* second, double* most) noexcept nogil:
    """Rows whose values have a weight each, double where they are wide, else float; or one per row, in a double."""
    if not each:
        if wide:
            weigh_rows_by(u, su, w, sw, chosen, rows, ahead, width, p, False, True, shifted, total, first, second, most)
        else:
            weigh_rows_by(u, su, w, sw, chosen, rows, ahead, width, p, False, False, shifted, total, first, second, most)
    elif wide:
        weigh_rows_by(u, su, w, sw, chosen, rows, ahead, width, p, True, True, shifted, total, first, second, most)
    else:
        weigh_rows_by(u, su, w, sw, chosen, rows, ahead, width, p, True, False, shifted, total, first, second, most)


# -- parts ---------------------------------------------------------------------------------------------------------------


cdef inline bint are_finite(double first, double second) noexcept nogil:
    return isfinite(first) and isfinite(second)


cdef inline bint from_weighted_sums(double shift, double total, double* first, double* second) noexcept nogil:
    """(sum(w (x - shift)), sum(w (x - shift)^2)) -> (mean, m2), in place; whether that cancelled too much."""
    cdef double d, m2, squares = second[0]
    if total == 0:
        first[0] = second[0] = 0
        return False
    d = first[0] / total
    m2 = squares - first[0] * d
    first[0] = shift + d
    # Of equal values sums as long as a part leave no more than 2^-44 of their squares, by rounding; other values lie
    # further from their mean than a shift does that was rounded to their type.
    second[0] = 0.0 if m2 < squares * 5.7e-14 else m2  # a NaN stays
    if not isfinite(squares):  # of float64 data that are large: their deviations may not be
        return bool(isfinite(first[0]))
    return m2 * CANCELLED < squares


cdef inline void merge_weighted(double* total_a, double* mean_a, double* m2_a, const double* total_b,
                                const double* mean_b, const double* m2_b, Py_ssize_t width) noexcept nogil:
    """Merge part b into part a, for width neighbouring columns; see `merge`."""
    cdef double share, d
    cdef Py_ssize_t j
    for j in range(width):
        if total_b[j] == 0:
            continue
        if total_a[j] == 0:
            total_a[j], mean_a[j], m2_a[j] = total_b[j], mean_b[j], m2_b[j]
            continue
        share = total_b[j] / (total_a[j] + total_b[j])
        d = mean_b[j] - mean_a[j]
        mean_a[j] += d * share
        m2_a[j] += m2_b[j] + d * d * (total_a[j] * share)
        total_a[j] += total_b[j]
