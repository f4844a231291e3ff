"""Arithmetic per channel, a few side by side: the coefficients of *apply*, moving statistics, gradients of parameters."""
from cython cimport floating
from libc.math cimport INFINITY
from libc.string cimport memcpy

from .deviations cimport reciprocal_deviations
from .job cimport FROZEN, GRADIENT, NORMALIZE, POOLED, TRAIN, Job, Parameter
from .moments cimport divide, divided, exact_reciprocal


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


cdef enum:
    BATCH = 64  # channels that are worked on together, in loops that compilers vectorize


cdef inline bint are_floats(const Parameter* p) noexcept nogil:
    """Whether its numbers are float32, side by side."""
    return p.data != NULL and p.stride == sizeof(float) and not p.wide


cdef inline const double* loaded(const Parameter* p, Py_ssize_t c, Py_ssize_t n, double default, double* room) noexcept nogil:
    """The numbers of some channels: where they are, if they are as they should be, else in the room."""
    cdef const char* data = NULL
    cdef Py_ssize_t i
    if p.data != NULL:
        data = p.data + c * p.stride
    if data == NULL:
        for i in range(n):
            room[i] = default
    elif p.wide and p.stride == sizeof(double):
        return <const double*> data
    elif are_floats(p):
        for i in range(n):
            room[i] = (<const float*> data)[i]
    else:
        for i in range(n):
            room[i] = load(p, c + i, default)
    return room


cdef inline void load_all(const Parameter* p, Py_ssize_t n, double* values) noexcept nogil:
    """The numbers of n channels; there is a parameter."""
    cdef const double* numbers = loaded(p, 0, n, 0, values)
    if numbers != values:
        memcpy(values, numbers, n * sizeof(double))


cdef inline void store_all(const Parameter* p, Py_ssize_t c, Py_ssize_t n, const double* values) noexcept nogil:
    cdef char* data = p.data + c * p.stride
    cdef Py_ssize_t i
    if are_floats(p):
        for i in range(n):
            (<float*> data)[i] = <float> values[i]
    else:
        for i in range(n):
            store(p, c + i, values[i])


cdef inline void blend_some(const Parameter* old, const Parameter* new, double divisor, Py_ssize_t c, Py_ssize_t n,
                            double momentum) noexcept nogil:
    """`blend_all` of up to BATCH channels from c on."""
    cdef double[BATCH] value
    cdef double[BATCH] room
    cdef double[BATCH] new_room
    cdef const double* now = loaded(new, c, n, 0, new_room)
    cdef const double* past
    cdef double share = exact_reciprocal(divisor)
    cdef Py_ssize_t i
    if momentum != 0:
        past = loaded(old, c, n, 0, room)
        for i in range(n):
            value[i] = (1 - momentum) * divided(now[i], divisor, share) + momentum * past[i]
    else:  # a NaN of the past would stay
        for i in range(n):
            value[i] = divided(now[i], divisor, share)
    store_all(old, c, n, value)


cdef inline void blend_all(const Parameter* old, const Parameter* new, double divisor, Py_ssize_t channels,
                           double momentum) noexcept nogil:
    """old = momentum * old + (1 - momentum) * new / divisor."""
    cdef Py_ssize_t c = 0
    while c + BATCH <= channels:  # a constant number, so that loops are known
        blend_some(old, new, divisor, c, BATCH, momentum)
        c += BATCH
    if c < channels:
        blend_some(old, new, divisor, c, channels - c, momentum)


cdef inline void blend(const Parameter* old_mean, const Parameter* old_variance, const Parameter* mean,
                       const Parameter* variance, Py_ssize_t channels, double divisor, double momentum) noexcept nogil:
    """moving = momentum * moving + (1 - momentum) * batch, in float64; the batch variance is ``variance / divisor``."""
    blend_all(old_mean, mean, 1, channels, momentum)
    blend_all(old_variance, variance, divisor, channels, momentum)


cdef inline void blend_counted(const Parameter* old_mean, const Parameter* old_variance, const Parameter* mean,
                               const Parameter* variance, Py_ssize_t channels, const double* counts, double ddof,
                               double momentum) noexcept nogil:
    """The same where counts differ: a channel without any keeps what it has, and one up to ddof its batch variance."""
    cdef Parameter old[2]
    cdef Parameter new[2]
    cdef Py_ssize_t c, i
    old[0], old[1], new[0], new[1] = old_mean[0], old_variance[0], mean[0], variance[0]
    for c in range(channels):
        if counts[c] > 0:
            blend(old, old + 1, new, new + 1, 1, (counts[c] - ddof) / counts[c] if counts[c] > ddof else 1, momentum)
        for i in range(2):
            old[i].data += old[i].stride
            new[i].data += new[i].stride


cdef inline double variance_of(double m2, double count, double ddof, double without) noexcept nogil:
    """m2 / (count - ddof); m2 / count where that is not positive, and another number where there is none."""
    if count == 0:
        return without
    return m2 / (count - ddof if count > ddof else count)


cdef inline void settle(const Job* job) noexcept nogil:
    """What training leaves when its results are written: the moving statistics, from mean and variance in first and second."""
    cdef Parameter mean, variance
    cdef double count = <double> job.outer * <double> job.inner
    if job.mean.data == NULL:
        return
    mean.data, variance.data = <char*> job.first, <char*> job.second
    mean.stride = variance.stride = sizeof(double)
    mean.wide = variance.wide = True
    if job.weighs:
        blend_counted(&job.mean, &job.variance, &mean, &variance, job.channels, job.total, job.ddof, job.keeps)
    else:
        blend(&job.mean, &job.variance, &mean, &variance, job.channels, max(count - job.ddof, 1.0) / count, job.keeps)


cdef inline void averages(const Job* job, const double* sums, Py_ssize_t c, Py_ssize_t n, double* found) noexcept nogil:
    """Sums of channels c to c + n over their counts; over 1 where there is no weight at all."""
    cdef Py_ssize_t i
    if job.weighs:
        for i in range(n):
            found[i] = sums[c + i] / (1 if job.total[c + i] == 0 else job.total[c + i])
    else:
        divide(sums + c, 1 if job.operation == POOLED else <double> job.outer * <double> job.inner, n, found)


cdef inline const double* variances(const Job* job, Py_ssize_t c, Py_ssize_t n, double* room) noexcept nogil:
    """Variances of channels c to c + n. A channel without any weight is as if its variance were infinite."""
    cdef const double* numbers
    cdef double* found = job.second + c if job.settles else room
    cdef Py_ssize_t i
    if job.operation == TRAIN:
        averages(job, job.second, c, n, found)
        numbers = found
    else:
        numbers = loaded(&job.variance, c, n, 1, room)
    if not job.weighs:
        return numbers
    for i in range(n):
        found[i] = INFINITY if job.total[c + i] == 0 else numbers[i]
    return found


cdef inline void put_gradients(const Parameter* dgamma, const Parameter* dbeta, Py_ssize_t c, Py_ssize_t n,
                               const double* first, const double* second, const double* scale) noexcept nogil:
    """Of n channels from c: dbeta = sum(dy), dgamma = sum(dy * (x - mean)) * scale, each where it is wanted."""
    cdef double[BATCH] value
    cdef Py_ssize_t i
    if dbeta.data != NULL:
        store_all(dbeta, c, n, first)
    if dgamma.data != NULL:
        for i in range(n):
            value[i] = second[i] * scale[i]
        store_all(dgamma, c, n, value)


ctypedef fused number:
    # A parameter's, beside `floating`, the type of data.
    float
    double


cdef inline void normalizing(const number* mean, const number* gamma, const number* beta, const double* scale, Py_ssize_t n,
                             Py_ssize_t stride, floating* p) noexcept nogil:
    """`coefficients_of` y = (x - mean) * gamma * scale + beta."""
    cdef floating* a = p + stride
    cdef floating* shift = a + stride
    cdef double k
    cdef Py_ssize_t i
    for i in range(n):
        k = gamma[i] * scale[i]
        a[i] = <floating> k
        p[i] = <floating> mean[i]
        if number is float:  # nothing is left over of a mean, unless it is infinite: what takes part is NaN or 0
            shift[i] = beta[i] - (mean[i] - <float> p[i]) * gamma[i]
        else:
            shift[i] = <floating> (beta[i] - (mean[i] - p[i]) * k)


cdef inline bint takes_floats(const Job* job) noexcept nogil:
    """Whether it is an inference whose parameters are float32."""
    return (job.operation == NORMALIZE and not job.weighs and are_floats(&job.mean) and are_floats(&job.variance)
            and are_floats(&job.gamma) and are_floats(&job.beta))


cdef inline void coefficients_of_floats(const Job* job, Py_ssize_t c, Py_ssize_t n, Py_ssize_t stride, floating* p) noexcept nogil:
    """`coefficients_of` an inference that `takes_floats`: converting all of them first takes a tenth of the call for one row."""
    cdef float[BATCH] mean  # copies: compilers have to know that they are apart from the results
    cdef float[BATCH] gamma
    cdef float[BATCH] beta
    cdef double[BATCH] scale
    memcpy(mean, <const float*> job.mean.data + c, n * sizeof(float))
    memcpy(gamma, <const float*> job.gamma.data + c, n * sizeof(float))
    memcpy(beta, <const float*> job.beta.data + c, n * sizeof(float))
    reciprocal_deviations(<const float*> job.variance.data + c, job.epsilon, n, floating is float, scale)
    normalizing(<const float*> mean, <const float*> gamma, <const float*> beta, scale, n, stride, p)


cdef inline void coefficients_of(const Job* job, Py_ssize_t c, Py_ssize_t n, Py_ssize_t stride, floating* p) noexcept nogil:
    """`coefficients` of up to BATCH channels from c on."""
    cdef double[BATCH] mean_room
    cdef double[BATCH] gamma_room
    cdef double[BATCH] beta_room
    cdef double[BATCH] variance_room
    cdef double[BATCH] scale
    cdef double[BATCH] ks
    cdef double[BATCH] slopes
    cdef const double* mean = job.first + c if job.operation == TRAIN else loaded(&job.mean, c, n, 0, mean_room)
    cdef const double* variance = variances(job, c, n, variance_room)
    cdef const double* gamma = loaded(&job.gamma, c, n, 1, gamma_room)
    cdef double k, slope
    cdef Py_ssize_t i
    cdef floating* a = p + stride
    cdef floating* shift = a + stride
    cdef floating* q = shift + stride
    cdef floating* b = q + stride
    reciprocal_deviations(variance, job.epsilon, n, floating is float, scale)
    if job.operation == FROZEN:
        for i in range(n):
            p[i] = shift[i] = 0
            a[i] = <floating> (gamma[i] * scale[i])
    elif job.operation == GRADIENT or job.operation == POOLED:
        # dx = gamma r (dy - sum(dy) / m - (x - mean) r dgamma / m); never r^3, which data far from 1 would take
        # out of range
        averages(job, job.first, c, n, ks)
        averages(job, job.second, c, n, slopes)
        for i in range(n):
            k = ks[i]
            slope = -scale[i] * (slopes[i] * scale[i])
            a[i] = <floating> (gamma[i] * scale[i])
            p[i] = <floating> (0 if job.weighs else k)
            q[i] = <floating> mean[i]
            b[i] = <floating> slope
            shift[i] = <floating> (-(k - p[i]) - (mean[i] - q[i]) * slope)
    else:
        normalizing(mean, gamma, loaded(&job.beta, c, n, 0, beta_room), scale, n, stride, p)
    # Last: dgamma may be gamma.
    put_gradients(&job.dgamma, &job.dbeta, c, n, job.first + c, job.second + c, scale)


cdef inline void coefficients(const Job* job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t stride,
                              floating* table) noexcept nogil:
    """The numbers of channels c0..c1 for *apply*, as [p, a, shift, q, b][channel] with that many channels in a row.

    y = (u - p) * a + shift, or ((u - p) + ((v - q) * b + shift)) * a. What is subtracted from the data is the leading
    part of a mean, in the type of the data; what that rounding left over goes, scaled, into the shift. So the result is
    as exact on data far from zero as on data around it. q and b are only written where a second operand is scaled.

    A gradient's parameters get theirs here: dbeta = sum(dy), dgamma = sum(dy * (x - mean)) / sqrt(variance + epsilon).
    """
    cdef Py_ssize_t c = c0
    cdef bint floats = takes_floats(job)
    while c + BATCH <= c1:  # a constant number, so that loops are known
        if floats:
            coefficients_of_floats(job, c, BATCH, stride, table + c)
        else:
            coefficients_of(job, c, BATCH, stride, table + c)
        c += BATCH
    if c < c1:
        coefficients_of(job, c, c1 - c, stride, table + c)
