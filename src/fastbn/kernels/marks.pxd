"""Sums of values that count or do not, by a mask or as NaN is missing: as those of sums.pxd, told in the registers.

A value counts by all of its bits or by none, so infinite and missing values that do not count do no harm.
"""
from cython cimport floating

from .given_weights cimport mark
from .packs cimport (
    LANES, ND, VD, both, count, how_many, kept, last_marks, load_counts, marked, numbers_d, numbers_f, prefetch, splat_d,
    store_counts, vc, vd, vk,
)
from .sums cimport add_pack, later, pitch, relative, there


cdef inline vk counting(const floating* x, const mark* m, bint has_marks, bint omits) noexcept nogil:
    """Which of LANES values count."""
    if not omits:
        return marked(m)
    if floating is float:
        return both(marked(m), numbers_f(x)) if has_marks else numbers_f(x)
    else:
        return both(marked(m), numbers_d(x)) if has_marks else numbers_d(x)


cdef inline vd chosen_from(const floating* x, vd shift, vk k, int j, bint has_marks, bint shifted) noexcept nogil:
    """Pack j of what counts, relative to the shift. Without marks that is what is no number: told quicker anew than from k."""
    if has_marks:
        return kept(relative(x, shift, shifted), k, j)
    return there(relative(x, shift, shifted), x, True)


cdef inline Py_ssize_t keep_run_as(const floating* u, Py_ssize_t su, const mark* m, Py_ssize_t sm, Py_ssize_t runs,
                                   Py_ssize_t n, double p, bint has_marks, bint omits, bint shifted, Py_ssize_t next_u,
                                   double* first, double* second) noexcept nogil:
    cdef vd s[ND]
    cdef vd t[ND]
    cdef vd du
    cdef vd ps = splat_d(p)
    cdef vk k
    cdef Py_ssize_t _r, _k, i, j, rest = n % LANES, total = 0
    for j in range(ND):
        s[j] = (<vd*> first)[j]
        t[j] = (<vd*> second)[j]
    for _r in range(runs):
        i = 0
        for _k in range(n // LANES):
            prefetch(u + next_u + i)
            k = counting(u + i, m + i, has_marks, omits)
            total += how_many(k)
            for j in range(ND):
                du = chosen_from(u + i + j * VD, ps, k, <int> j, has_marks, shifted)
                add_pack(s + j, t + j, du, du, shifted, False)
            i = i + LANES
        if rest:
            i = n - LANES
            k = both(counting(u + i, m + i, has_marks, omits), marked(last_marks + rest))
            total += how_many(k)
            for j in range(ND):
                if (j + 1) * VD > LANES - rest:
                    du = kept(relative(u + i + j * VD, ps, shifted), k, <int> j)
                    add_pack(s + j, t + j, du, du, shifted, False)
        u += su
        m += sm
    for j in range(ND):
        (<vd*> first)[j] = s[j]
        (<vd*> second)[j] = t[j]
    return total


cdef inline void keep_rows_as(const floating* u, Py_ssize_t su, const mark* m, Py_ssize_t sm, const Py_ssize_t* chosen,
                              Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, const double* p, bint has_marks,
                              bint omits, bint shifted, mark* seen, double* first, double* second) noexcept nogil:
    cdef vd s[ND]
    cdef vd t[ND]
    cdef vd ps[ND]
    cdef vd du
    cdef vk which
    cdef vc counts
    cdef Py_ssize_t i, j, k, n, row, pu = pitch(su, width, 1)
    cdef const floating* next_u
    for k in range(width // LANES):
        i = k * LANES
        next_u = later(u, su, rows, ahead, width, k)
        counts = load_counts(seen + i)
        for j in range(ND):
            s[j] = (<vd*> (first + i))[j]
            t[j] = (<vd*> (second + i))[j]
            ps[j] = (<vd*> (p + i))[j]
        for n in range(rows):
            prefetch(next_u + n * pu)
            row = chosen[n]
            which = counting(u + row * su + i, m + row * sm + i, has_marks, omits)
            counts = count(counts, which)
            for j in range(ND):
                du = chosen_from(u + row * su + i + j * VD, ps[j], which, <int> j, has_marks, shifted)
                add_pack(s + j, t + j, du, du, shifted, False)
        store_counts(seen + i, counts)
        for j in range(ND):
            (<vd*> (first + i))[j] = s[j]
            (<vd*> (second + i))[j] = t[j]


cdef inline Py_ssize_t keep_run_by(const floating* u, Py_ssize_t su, const mark* m, Py_ssize_t sm, Py_ssize_t runs,
                                   Py_ssize_t n, double p, bint has_marks, bint omits, bint shifted, Py_ssize_t next_u,
                                   double* first, double* second) noexcept nogil:
    if shifted:
        return keep_run_as(u, su, m, sm, runs, n, p, has_marks, omits, True, next_u, first, second)
    elif floating is float:
        return keep_run_as(u, su, m, sm, runs, n, p, has_marks, omits, False, next_u, first, second)
    else:
        return 0


cdef inline Py_ssize_t keep_run(const floating* u, Py_ssize_t su, const mark* m, Py_ssize_t sm, Py_ssize_t runs, Py_ssize_t n,
                                double p, bint omits, bint shifted, Py_ssize_t next_u, double* first,
                                double* second) noexcept nogil:
    """Add what counts of runs of n >= LANES values to LANES pairs of sums, as `reduce_runs`; how much does.

    m is NULL where there is no mask, and sm the distance between the marks of two runs.
    """
    if m == NULL:
        return keep_run_by(u, su, m, 0, runs, n, p, False, True, shifted, next_u, first, second)
    if omits:
        return keep_run_by(u, su, m, sm, runs, n, p, True, True, shifted, next_u, first, second)
    return keep_run_by(u, su, m, sm, runs, n, p, True, False, shifted, next_u, first, second)


cdef inline void keep_rows_by(const floating* u, Py_ssize_t su, const mark* m, Py_ssize_t sm, const Py_ssize_t* chosen,
                              Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, const double* p, bint has_marks,
                              bint omits, bint shifted, mark* seen, double* first, double* second) noexcept nogil:
    if shifted:
        keep_rows_as(u, su, m, sm, chosen, rows, ahead, width, p, has_marks, omits, True, seen, first, second)
    elif floating is float:
        keep_rows_as(u, su, m, sm, chosen, rows, ahead, width, p, has_marks, omits, False, seen, first, second)


cdef inline void keep_rows(const floating* u, Py_ssize_t su, const mark* m, Py_ssize_t sm, const Py_ssize_t* chosen,
                           Py_ssize_t rows, Py_ssize_t ahead, Py_ssize_t width, const double* p, bint omits, bint shifted,
                           mark* seen, double* first, double* second) noexcept nogil:
    """Add what counts of the rows that are chosen to one pair of sums per column, as `reduce_rows`.

    How much of a column was seen to count is at most 255. m is NULL where there is no mask, and sm the distance between its
    rows.
    """
    if m == NULL:
        keep_rows_by(u, su, m, sm, chosen, rows, ahead, width, p, False, True, shifted, seen, first, second)
    elif omits:
        keep_rows_by(u, su, m, sm, chosen, rows, ahead, width, p, True, True, shifted, seen, first, second)
    else:
        keep_rows_by(u, su, m, sm, chosen, rows, ahead, width, p, True, False, shifted, seen, first, second)
