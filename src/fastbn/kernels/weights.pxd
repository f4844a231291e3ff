"""Values that do not all count alike: sums of weighted or missing values.

    total += w,   first += w * (x - p),   second += w * (x - p) * (x - p)
    first += u,   second += u * (v - q)         the gradient, over all values that are not missing

w is a weight, 0 or more, given for each value (EACH_WEIGHT), for a whole run or row (ONE_WEIGHT), or 1 (NO_WEIGHTS); with
``omit`` it is 0 where x is NaN. In the gradient what has no weight and is not finite is missing; what has none and is finite
got a y, so its dy counts.

Values of weight 0 do no harm, NaN and inf neither: they are selected out. While everything is finite a product with 0 comes
to the same, to the bit; so a part is first summed without selecting, an operation less per value, and again if its sums
are not finite. The gradient's first sums are the plain ones.

Accuracy     weighted terms are not exact in float64, and never fused. A part is summed as it is (p = 0); where its mean is
             large beside its deviation it is summed again relative to its mean. No value decides about the shift: neither
             an outlier of weight 0 nor a missing first value can spoil it.
Merge        by Chan's formula with sums of weights for counts; parts without weight are passed over.
"""
from cython cimport floating
from libc.math cimport isfinite
from libc.stdint cimport int64_t

from .convert cimport DOUBLE, FLOAT
from .job cimport Weights
from .lanes cimport LANES, ND, VD, last_masks, masked, prefetch, select_d, splat_d, vd, widen
from .moments cimport CANCELLED


cdef enum Spread:
    NO_WEIGHTS
    ONE_WEIGHT
    EACH_WEIGHT


cdef inline const char* weights_at(const Weights* w, Py_ssize_t n, Py_ssize_t c, Py_ssize_t s) noexcept nogil:
    """Where the weight of (n, c, s) is."""
    return w.data + n // w.repeat * w.major + n % w.repeat * w.minor + c * w.channel + s * w.inner


cdef inline double weight_at(const Weights* w, const char* x) noexcept nogil:
    if w.kind == DOUBLE:
        return (<const double*> x)[0]
    if w.kind == FLOAT:
        return (<const float*> x)[0]
    return (<const unsigned char*> x)[0]


cdef inline void take_weights(const Weights* w, const char* x, Py_ssize_t sx, Py_ssize_t n, floating* y) noexcept nogil:
    """n weights, sx bytes apart, side by side to y."""
    cdef Py_ssize_t i
    cdef floating one
    if sx == 0:
        one = <floating> weight_at(w, x)
        for i in range(n):
            y[i] = one
    elif w.kind == DOUBLE:
        if sx == sizeof(double):
            for i in range(n):
                y[i] = <floating> (<const double*> x)[i]
        else:
            for i in range(n):
                y[i] = <floating> (<const double*> (x + i * sx))[0]
    elif w.kind == FLOAT:
        if sx == sizeof(float):
            for i in range(n):
                y[i] = <floating> (<const float*> x)[i]
        else:
            for i in range(n):
                y[i] = <floating> (<const float*> (x + i * sx))[0]
    elif sx == 1:
        for i in range(n):
            y[i] = (<const unsigned char*> x)[i]
    else:
        for i in range(n):
            y[i] = (<const unsigned char*> x)[i * sx]


cdef inline vd weight_pack(const char* w, Py_ssize_t i, bint wide) noexcept nogil:
    if wide:
        return widen(<const double*> w + i)
    return widen(<const float*> w + i)


cdef inline void add_weighted(vd* r, vd* s, vd* t, vd w, vd x, vd p, int spread, bint selects, bint omit,
                              bint counts) noexcept nogil:
    """The formula, the only place where it stands. Unless it selects, there is no shift, and no weight but of finite x."""
    cdef vd zero = splat_d(0)
    cdef vd first
    if omit:
        w = select_d(x, x, w, zero)
    if selects:
        x = select_d(w, zero, zero, x - p)
    first = x if spread == NO_WEIGHTS else w * x
    if counts:
        r[0] = r[0] + w
    s[0] = s[0] + first
    t[0] = t[0] + first * x


cdef inline void add_present(vd* s, vd* t, vd w, vd u, vd v, vd q, bint omit) noexcept nogil:
    """The formula of the gradient."""
    cdef vd zero = splat_d(0)
    if omit:
        w = select_d(v, v, w, zero)
    u = select_d(w, zero, select_d(v - v, zero, u, zero), u)
    s[0] = s[0] + u
    t[0] = t[0] + u * select_d(w, zero, select_d(v - v, zero, v - q, zero), v - q)


cdef inline void add_pack(vd* r, vd* s, vd* t, vd w, vd u, vd v, vd p, bint pair, int spread, bint selects, bint omit,
                          bint counts) noexcept nogil:
    if pair:
        add_present(s, t, w, u, v, p, omit)
    else:
        add_weighted(r, s, t, w, u, p, spread, selects, omit, counts)


cdef inline void weigh_run_as(const floating* u, const floating* v, const char* w, double one, Py_ssize_t n, double p,
                              bint pair, int spread, bint wide, bint selects, bint omit, bint counts, Py_ssize_t next_u,
                              double* total, double* first, double* second) noexcept nogil:
    """Add a run of n >= LANES values of one channel to LANES sets of sums; see `reduce_run`."""
    cdef vd r[ND]
    cdef vd s[ND]
    cdef vd t[ND]
    cdef vd du
    cdef vd dw
    cdef vd ps = splat_d(p)
    cdef vd ws = splat_d(one)
    cdef Py_ssize_t i, j, k, rest = n % LANES
    cdef const int64_t* mask = last_masks + rest
    for j in range(ND):
        r[j] = (<vd*> total)[j]
        s[j] = (<vd*> first)[j]
        t[j] = (<vd*> second)[j]
    for k in range(n // LANES):
        i = k * LANES
        prefetch(u + next_u + i)
        for j in range(ND):
            dw = weight_pack(w, i + j * VD, wide) if spread == EACH_WEIGHT else ws
            du = widen(u + i + j * VD)
            add_pack(r + j, s + j, t + j, dw, du, widen(v + i + j * VD) if pair else du, ps, pair, spread, selects, omit,
                     counts)
    if rest:  # what was added already has no weight, or a gradient of 0
        i = n - LANES
        for j in range(ND):
            if (j + 1) * VD > LANES - rest:
                dw = weight_pack(w, i + j * VD, wide) if spread == EACH_WEIGHT else ws
                if pair:
                    du = masked(widen(u + i + j * VD), mask + j * VD)
                    add_present(s + j, t + j, dw, du, widen(v + i + j * VD), ps, omit)
                else:
                    dw = masked(dw, mask + j * VD)
                    du = widen(u + i + j * VD)
                    if not selects:
                        du = masked(du, mask + j * VD)
                    add_weighted(r + j, s + j, t + j, dw, du, ps, spread, selects, omit, counts)
    for j in range(ND):
        (<vd*> total)[j] = r[j]
        (<vd*> first)[j] = s[j]
        (<vd*> second)[j] = t[j]


cdef inline void weigh_rows_as(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, const char* w,
                               Py_ssize_t sw, Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, const double* p,
                               bint pair, int spread, bint wide, bint selects, bint omit, double* total, double* first,
                               double* second) noexcept nogil:
    """Add rows to one set of sums per column; see `reduce_rows`. sw is the distance between rows of weights.

    The width is a multiple of LANES. Where each row has one weight, and none is missing, the total is left alone.
    """
    cdef vd r[ND]
    cdef vd s[ND]
    cdef vd t[ND]
    cdef vd ps[ND]
    cdef vd du
    cdef vd dw = splat_d(1)
    cdef Py_ssize_t i, j, k, row
    for k in range(width // LANES):
        i = k * LANES
        for j in range(ND):
            r[j] = (<vd*> (total + i))[j]
            s[j] = (<vd*> (first + i))[j]
            t[j] = (<vd*> (second + i))[j]
            ps[j] = (<vd*> (p + i))[j]
        for row in range(rows):
            prefetch(u + (row + ahead) * su + i)
            if spread == ONE_WEIGHT:
                if (<const double*> w)[row] == 0 and not pair:
                    continue
                dw = splat_d((<const double*> w)[row])
            for j in range(ND):
                if spread == EACH_WEIGHT:
                    dw = weight_pack(w, row * sw + i + j * VD, wide)
                du = widen(u + row * su + i + j * VD)
                add_pack(r + j, s + j, t + j, dw, du, widen(v + row * sv + i + j * VD) if pair else du, ps[j], pair,
                         spread, selects, omit, omit or spread == EACH_WEIGHT)
        for j in range(ND):
            (<vd*> (total + i))[j] = r[j]
            (<vd*> (first + i))[j] = s[j]
            (<vd*> (second + i))[j] = t[j]


cdef inline void weigh_run(const floating* u, const floating* v, const char* w, double one, bint wide, Py_ssize_t n,
                           double p,
                           bint pair, int spread, bint selects, bint omit, bint counts, Py_ssize_t next_u, double* total,
                           double* first, double* second) noexcept nogil:
    """The same with everything that is constant there. Weights are double where they are wide, else float."""
    if pair:
        if spread == NO_WEIGHTS:
            weigh_run_as(u, v, w, 1, n, p, True, NO_WEIGHTS, True, True, True, False, next_u, total, first, second)
        elif omit:
            if wide:
                weigh_run_as(u, v, w, one, n, p, True, EACH_WEIGHT, True, True, True, False, next_u, total, first,
                             second)
            else:
                weigh_run_as(u, v, w, one, n, p, True, EACH_WEIGHT, False, True, True, False, next_u, total, first,
                             second)
        else:
            if wide:
                weigh_run_as(u, v, w, one, n, p, True, EACH_WEIGHT, True, True, False, False, next_u, total, first,
                             second)
            else:
                weigh_run_as(u, v, w, one, n, p, True, EACH_WEIGHT, False, True, False, False, next_u, total, first,
                             second)
    elif spread == NO_WEIGHTS:
        weigh_run_as(u, u, w, 1, n, p, False, NO_WEIGHTS, True, True, True, True, next_u, total, first, second)
    elif spread == ONE_WEIGHT:
        if omit:
            weigh_run_as(u, u, w, one, n, p, False, ONE_WEIGHT, True, True, True, True, next_u, total, first, second)
        elif selects:
            if counts:
                weigh_run_as(u, u, w, one, n, p, False, ONE_WEIGHT, True, True, False, True, next_u, total, first,
                             second)
            else:
                weigh_run_as(u, u, w, one, n, p, False, ONE_WEIGHT, True, True, False, False, next_u, total, first,
                             second)
        else:
            if counts:
                weigh_run_as(u, u, w, one, n, p, False, ONE_WEIGHT, True, False, False, True, next_u, total, first,
                             second)
            else:
                weigh_run_as(u, u, w, one, n, p, False, ONE_WEIGHT, True, False, False, False, next_u, total, first,
                             second)
    elif omit:
        if wide:
            weigh_run_as(u, u, w, one, n, p, False, EACH_WEIGHT, True, True, True, True, next_u, total, first, second)
        else:
            weigh_run_as(u, u, w, one, n, p, False, EACH_WEIGHT, False, True, True, True, next_u, total, first, second)
    elif selects:
        if wide:
            if counts:
                weigh_run_as(u, u, w, one, n, p, False, EACH_WEIGHT, True, True, False, True, next_u, total, first,
                             second)
            else:
                weigh_run_as(u, u, w, one, n, p, False, EACH_WEIGHT, True, True, False, False, next_u, total, first,
                             second)
        else:
            if counts:
                weigh_run_as(u, u, w, one, n, p, False, EACH_WEIGHT, False, True, False, True, next_u, total, first,
                             second)
            else:
                weigh_run_as(u, u, w, one, n, p, False, EACH_WEIGHT, False, True, False, False, next_u, total, first,
                             second)
    else:
        if wide:
            if counts:
                weigh_run_as(u, u, w, one, n, p, False, EACH_WEIGHT, True, False, False, True, next_u, total, first,
                             second)
            else:
                weigh_run_as(u, u, w, one, n, p, False, EACH_WEIGHT, True, False, False, False, next_u, total, first,
                             second)
        else:
            if counts:
                weigh_run_as(u, u, w, one, n, p, False, EACH_WEIGHT, False, False, False, True, next_u, total, first,
                             second)
            else:
                weigh_run_as(u, u, w, one, n, p, False, EACH_WEIGHT, False, False, False, False, next_u, total, first,
                             second)


cdef inline void weigh_rows(const floating* u, Py_ssize_t su, const floating* v, Py_ssize_t sv, const char* w,
                            Py_ssize_t sw,
                            bint wide, Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, const double* p, bint pair,
                            int spread, bint selects, bint omit, double* total, double* first,
                            double* second) noexcept nogil:
    """The same with everything that is constant there. Each weight is a double where they are wide, one of a row always."""
    if pair:
        if spread == NO_WEIGHTS:
            weigh_rows_as(u, su, v, sv, w, sw, rows, ahead, width, p, True, NO_WEIGHTS, True, True, True, total,
                          first, second)
        elif omit:
            if wide:
                weigh_rows_as(u, su, v, sv, w, sw, rows, ahead, width, p, True, EACH_WEIGHT, True, True, True, total,
                              first, second)
            else:
                weigh_rows_as(u, su, v, sv, w, sw, rows, ahead, width, p, True, EACH_WEIGHT, False, True, True, total,
                              first, second)
        else:
            if wide:
                weigh_rows_as(u, su, v, sv, w, sw, rows, ahead, width, p, True, EACH_WEIGHT, True, True, False, total,
                              first, second)
            else:
                weigh_rows_as(u, su, v, sv, w, sw, rows, ahead, width, p, True, EACH_WEIGHT, False, True, False,
                              total, first, second)
    elif spread == NO_WEIGHTS:
        weigh_rows_as(u, su, u, su, w, sw, rows, ahead, width, p, False, NO_WEIGHTS, True, True, True, total, first,
                      second)
    elif spread == ONE_WEIGHT:
        if omit:
            weigh_rows_as(u, su, u, su, w, sw, rows, ahead, width, p, False, ONE_WEIGHT, True, True, True, total,
                          first, second)
        elif selects:
            weigh_rows_as(u, su, u, su, w, sw, rows, ahead, width, p, False, ONE_WEIGHT, True, True, False, total,
                          first, second)
        else:
            weigh_rows_as(u, su, u, su, w, sw, rows, ahead, width, p, False, ONE_WEIGHT, True, False, False, total,
                          first, second)
    elif omit:
        if wide:
            weigh_rows_as(u, su, u, su, w, sw, rows, ahead, width, p, False, EACH_WEIGHT, True, True, True, total,
                          first, second)
        else:
            weigh_rows_as(u, su, u, su, w, sw, rows, ahead, width, p, False, EACH_WEIGHT, False, True, True, total,
                          first, second)
    elif selects:
        if wide:
            weigh_rows_as(u, su, u, su, w, sw, rows, ahead, width, p, False, EACH_WEIGHT, True, True, False, total,
                          first, second)
        else:
            weigh_rows_as(u, su, u, su, w, sw, rows, ahead, width, p, False, EACH_WEIGHT, False, True, False, total,
                          first, second)
    else:
        if wide:
            weigh_rows_as(u, su, u, su, w, sw, rows, ahead, width, p, False, EACH_WEIGHT, True, False, False, total,
                          first, second)
        else:
            weigh_rows_as(u, su, u, su, w, sw, rows, ahead, width, p, False, EACH_WEIGHT, False, False, False, total,
                          first, second)


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
    second[0] = 0.0 if m2 < 0 else m2  # a NaN stays
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
