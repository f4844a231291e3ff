"""What a driver is told: operands, parameters, and the formula that turns a channel's numbers into coefficients."""
from cython cimport floating
from libc.math cimport sqrt

cdef enum Operation:
    MOMENTS    # x -> (mean, m2)
    NORMALIZE  # x, mean, variance -> y
    TRAIN      # x -> (mean, m2) -> y
    GRADIENT   # dy, x, mean, variance -> (sum dy, sum dy * (x - mean)) -> dx through the batch statistics
    FROZEN     # the same sums, but dx is dy scaled: the statistics were constants


cdef struct Operand:
    char* data
    # distances in values from one (outer, channel, inner) index to the next
    Py_ssize_t outer
    Py_ssize_t channel
    Py_ssize_t inner


cdef struct Parameter:
    char* data         # NULL where the parameter is None
    Py_ssize_t stride  # bytes
    bint wide          # float64, else float32


cdef struct Job:
    Operation operation
    bint reduces, applies
    bint reads_pair   # reduce reads both operands
    bint writes_pair  # apply reads both operands
    bint streams      # y is stored past the caches
    Py_ssize_t outer, channels, inner
    Operand u, v, y
    Parameter gamma, beta, mean, variance
    double epsilon
    double* first   # per channel: mean, or sum(dy)
    double* second  # per channel: m2, or sum(dy * (x - mean))
    int threads


cdef inline double load(const Parameter* p, Py_ssize_t c, double default) noexcept nogil:
    if p.data == NULL:
        return default
    if p.wide:
        return (<double*> (p.data + c * p.stride))[0]
    return (<float*> (p.data + c * p.stride))[0]


cdef inline void store(const Parameter* p, Py_ssize_t c, double value) noexcept nogil:
    if p.wide:
        (<double*> (p.data + c * p.stride))[0] = value
    else:
        (<float*> (p.data + c * p.stride))[0] = <float> value


cdef inline double reciprocal_deviation(double variance, double epsilon) noexcept nogil:
    """1 / sqrt(variance + epsilon); 0 where both are 0, so that a constant channel gives beta with any epsilon."""
    cdef double s = variance + epsilon
    return 0.0 if s == 0 else 1 / sqrt(s)


cdef inline void coefficients(const Job* job, Py_ssize_t c, floating* p, floating* a, floating* shift, floating* q,
                              floating* b) noexcept nogil:
    """One channel's numbers for *apply*: y = (u - p) * a + shift, or ((u - p) + ((v - q) * b + shift)) * a.

    What is subtracted from the data is the leading part of a mean, in the type of the data; what that rounding left
    over goes, scaled, into the shift. So the result is as exact on data far from zero as on data around it.
    """
    cdef double mean, variance, r, scale, slope, k
    cdef double count = <double> job.outer * <double> job.inner
    if job.operation == TRAIN:
        mean = job.first[c]
        variance = job.second[c] / count
    else:
        mean = load(&job.mean, c, 0)
        variance = load(&job.variance, c, 1)
    r = reciprocal_deviation(variance, job.epsilon)
    scale = load(&job.gamma, c, 1) * r
    a[0] = <floating> scale
    q[0] = 0
    b[0] = 0
    if job.operation == FROZEN:
        p[0] = 0
        shift[0] = 0
    elif job.operation == GRADIENT:
        # dx = gamma r (dy - sum(dy) / m - (x - mean) r dgamma / m); never r^3, which data far from 1 would take out of
        # range
        k = job.first[c] / count
        slope = -r * (job.second[c] * r / count)
        p[0] = <floating> k
        q[0] = <floating> mean
        b[0] = <floating> slope
        shift[0] = <floating> (-(k - p[0]) - (mean - q[0]) * slope)
    else:
        p[0] = <floating> mean
        shift[0] = <floating> (load(&job.beta, c, 0) - (mean - p[0]) * scale)
