"""How partial results become those of a channel: folding lanes, and Chan's merge.

T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
COMPSTAT 1982. A part is (count, mean, m2), m2 being the sum of squared deviations from its own mean: every addition to
m2 is of something that is not negative, so a variance never is.

A part of float32 data is first summed as it is: the sums of x, of x * x and of dy * x are of exact terms, and nothing is
faster. With d the part's mean, m2 = sum(x * x) - n * d * d loses at most a factor CANCELLED; where it would lose more
(the mean is large beside the deviation), the part is summed again relative to d itself, so that next to nothing cancels.
Which of the two a channel gets depends on its own values alone.

Squares of float64 data are not exact. A part is summed relative to a shift p that is one of its own values. With d the
mean of x - p, p's own deviation is d, so m2 >= d * d, and the cancellation in m2 = sum((x - p)^2) - n * d * d costs at
most a factor n of a part (some thousand) whatever the data are: neither an outlier nor an order of the values can spoil
it.
"""
from libc.math cimport frexp

cdef enum:
    CANCELLED = 64  # the mean is 8 times the deviation: m2 keeps 47 of the 53 bits


cdef inline bint is_far(double mean, double variance) noexcept nogil:
    """Whether sums of values as they are would cancel too much in what is relative to this mean."""
    return variance * CANCELLED < mean * mean


cdef inline double fold(const double* s) noexcept nogil:
    """The sum of LANES lanes, as a balanced tree; in one expression, so that no step waits for another in memory."""
    return ((((s[0] + s[8]) + (s[4] + s[12])) + ((s[2] + s[10]) + (s[6] + s[14])))
            + (((s[1] + s[9]) + (s[5] + s[13])) + ((s[3] + s[11]) + (s[7] + s[15]))))


cdef inline double exact_reciprocal(double count) noexcept nogil:
    """1 / count where multiplying by it is dividing by count, bit for bit; else 0. Divisions take most of a channel's time."""
    cdef int exponent
    return 1 / count if frexp(count, &exponent) == 0.5 else 0.0


cdef inline double divided(double x, double count, double share) noexcept nogil:
    """x / count; share is `exact_reciprocal` of the count, of which loops know that it does not change."""
    return x * share if share != 0 else x / count


cdef inline void divide(const double* x, double count, Py_ssize_t n, double* y) noexcept nogil:
    """y = x / count; y may be x."""
    cdef double share = exact_reciprocal(count)
    cdef Py_ssize_t i
    for i in range(n):
        y[i] = divided(x[i], count, share)


cdef inline void from_sums(double shift, double count, double share, double* first, double* second) noexcept nogil:
    """(sum(x - shift), sum((x - shift)^2)) -> (mean, m2), in place; share is `exact_reciprocal` of the count."""
    cdef double d = divided(first[0], count, share)
    cdef double m2 = second[0] - first[0] * d
    first[0] = shift + d
    second[0] = 0.0 if m2 < 0 else m2  # a NaN stays


cdef inline void merge(double na, double* mean_a, double* m2_a, double nb, const double* mean_b, const double* m2_b,
                       Py_ssize_t width) noexcept nogil:
    """Merge part b, of nb values, into part a, of na > 0: for width neighbouring columns that have the same counts."""
    cdef double share = nb / (na + nb)
    cdef double weight = na * share
    cdef double d
    cdef Py_ssize_t j
    for j in range(width):
        d = mean_b[j] - mean_a[j]
        mean_a[j] += d * share
        m2_a[j] += m2_b[j] + d * d * weight


cdef inline void add(double* first_a, double* second_a, const double* first_b, const double* second_b,
                     Py_ssize_t width) noexcept nogil:
    """The same for plain sums (the gradient's)."""
    cdef Py_ssize_t j
    for j in range(width):
        first_a[j] += first_b[j]
        second_a[j] += second_b[j]
