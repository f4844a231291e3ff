"""What a driver is told: operands, parameters, and the formula that turns a channel's numbers into coefficients."""
from cython cimport floating
from libc.math cimport INFINITY, sqrt

from .lanes cimport PRESENT, WEIGHTED, Form

cdef enum Operation:
    MOMENTS    # x -> (mean, m2)
    NORMALIZE  # x, mean, variance -> y
    TRAIN      # x -> (mean, m2) -> y
    GRADIENT   # dy, x, mean, variance -> (sum dy, sum dy * (x - mean)) -> dx through the batch statistics
    FROZEN     # the same sums, but dx is dy scaled: the statistics were constants
    POOLED     # dy, x, mean, variance, first and second -> dx, as in GRADIENT, but of sums that are given, over the count


cdef struct Operand:
    char* data
    int kind           # of its values: see convert.pxd
    Py_ssize_t size    # bytes of a value
    # distances in bytes from one (outer, channel, inner) index to the next
    Py_ssize_t outer
    Py_ssize_t channel
    Py_ssize_t inner


cdef struct Parameter:
    char* data         # NULL where the parameter is None
    Py_ssize_t stride  # bytes
    bint wide          # float64, else float32


cdef struct Weights:
    # How much every value counts in the statistics.
    char* data         # NULL: all alike
    int kind           # FLOAT, DOUBLE or UINT8: see convert.pxd
    Py_ssize_t size    # bytes of a weight
    bint marks         # each is 0 or 1
    bint unchecked     # nobody knows yet whether they are finite and not negative
    # Distances in bytes. An outer index i goes i // repeat times the first and i % repeat times the second, so that
    # weights of images need not be repeated for their positions.
    Py_ssize_t repeat, major, minor
    Py_ssize_t channel, inner


cdef struct Job:
    Operation operation
    bint reduces, applies
    bint reads_pair   # reduce reads both operands
    bint writes_pair  # apply reads both operands
    Form form         # the formula of apply
    bint gated        # dy comes through the derivative of an activation first
    bint by_output    # which is told from the activation's result, w
    Form gate         # the formula of that
    bint streams      # y is stored past the caches
    Py_ssize_t outer, channels, inner
    Operand u, v, w, y  # w is the residual, or the result of the activation
    Operand kept        # where the gated dy goes; in no memory where nobody wants it
    Parameter gamma, beta, mean, variance
    double epsilon
    double* first   # per channel: mean, or sum(dy)
    double* second  # per channel: m2, or sum(dy * (x - mean))
    bint weighs     # values count by weights, or not at all where they are missing: see weights.pxd
    bint omits      # NaN is missing
    Weights weights
    double* total   # per channel: sum of weights; found by sums of x, given to the gradient
    int threads
    bint interruptible  # whether to look for signals between waves, which takes the GIL


cdef enum Status:
    DONE
    NO_MEMORY
    INTERRUPTED  # a signal handler raised: the exception is set
    UNFIT        # unchecked weights cannot be summed as they are: nothing but statistics was written


# What a driver module exports, in a capsule of this name, to calls that need no Python on the way. It returns a Status,
# and never touches the GIL unless the job is interruptible.
ctypedef int (*Driver)(const Job* job, bint wide) noexcept nogil

cdef extern from *:
    """
    #define FASTBN_DRIVER "fastbn.kernels.driver"

    static int fastbn_finish(int status) {
        if (status == 1)
            PyErr_NoMemory();
        return status == 3 ? 1 : status ? -1 : 0;
    }
    """
    const char* DRIVER "FASTBN_DRIVER"
    int finish "fastbn_finish"(int status) except -1  # raises what a Status stands for; 1 for UNFIT
    int check_signals "PyErr_CheckSignals"() noexcept


cdef inline bint is_interrupted() noexcept with gil:
    """Whether a signal handler raised; the exception stays set."""
    return check_signals() != 0


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


cdef enum:
    BATCH = 64  # channels that are worked on together, in loops that compilers vectorize


cdef inline void load_all(const Parameter* p, Py_ssize_t c, Py_ssize_t n, double default, double* values) noexcept nogil:
    cdef const char* data = p.data + c * p.stride
    cdef Py_ssize_t i
    if p.data == NULL:
        for i in range(n):
            values[i] = default
    elif p.stride == (sizeof(double) if p.wide else sizeof(float)):
        if p.wide:
            for i in range(n):
                values[i] = (<const double*> data)[i]
        else:
            for i in range(n):
                values[i] = (<const float*> data)[i]
    else:
        for i in range(n):
            values[i] = load(p, c + i, default)


cdef inline void store_all(const Parameter* p, Py_ssize_t c, Py_ssize_t n, const double* values) noexcept nogil:
    cdef char* data = p.data + c * p.stride
    cdef Py_ssize_t i
    if p.stride == sizeof(float) and not p.wide:
        for i in range(n):
            (<float*> data)[i] = <float> values[i]
    else:
        for i in range(n):
            store(p, c + i, values[i])


cdef inline void blend_one(const Parameter* old, const Parameter* new, Py_ssize_t c, Py_ssize_t n, double divisor,
                           double momentum) noexcept nogil:
    cdef double[BATCH] value
    cdef double[BATCH] past
    cdef Py_ssize_t i
    load_all(new, c, n, 0, value)
    for i in range(n):
        value[i] = (1 - momentum) * (value[i] / divisor)
    if momentum != 0:  # else a NaN of the past would stay
        load_all(old, c, n, 0, past)
        for i in range(n):
            value[i] += momentum * past[i]
    store_all(old, c, n, value)


cdef inline void blend(const Parameter* old_mean, const Parameter* old_variance, const Parameter* mean,
                       const Parameter* variance, Py_ssize_t channels, double divisor, double momentum) noexcept nogil:
    """moving = momentum * moving + (1 - momentum) * batch, in float64; the batch variance is ``variance / divisor``."""
    cdef Py_ssize_t c = 0, n
    while c < channels:
        n = min(channels - c, <Py_ssize_t> BATCH)
        blend_one(old_mean, mean, c, n, 1, momentum)
        blend_one(old_variance, variance, c, n, divisor, momentum)
        c += n


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


cdef inline void to_parameter_gradients(const Job* job, const Parameter* dgamma, const Parameter* dbeta) noexcept nogil:
    """dbeta = sum(dy); dgamma = sum(dy * (x - mean)) / sqrt(variance + epsilon)."""
    cdef double[BATCH] scale
    cdef Py_ssize_t c = 0, i, n
    while c < job.channels:
        n = min(job.channels - c, <Py_ssize_t> BATCH)
        load_all(&job.variance, c, n, 1, scale)
        for i in range(n):
            scale[i] = job.second[c + i] * reciprocal_deviation(scale[i], job.epsilon)
        store_all(dbeta, c, n, job.first + c)
        store_all(dgamma, c, n, scale)
        c += n


cdef inline void weighted_counts(const Job* job, Py_ssize_t c, Py_ssize_t n, double* counts, double* variance) noexcept nogil:
    """What stands for the count: the weights. Without any a channel is as if its variance were infinite: it gives beta."""
    cdef Py_ssize_t i
    for i in range(n):
        counts[i] = job.total[c + i]
        if counts[i] == 0:
            counts[i] = 1
            variance[i] = INFINITY


cdef inline void coefficients(const Job* job, Py_ssize_t c0, Py_ssize_t c1, Py_ssize_t stride,
                              floating* table) noexcept nogil:
    """The numbers of channels c0..c1 for *apply*, as [p, a, shift, q, b][channel] with that many channels in a row.

    y = (u - p) * a + shift, or ((u - p) + ((v - q) * b + shift)) * a. What is subtracted from the data is the leading
    part of a mean, in the type of the data; what that rounding left over goes, scaled, into the shift. So the result is
    as exact on data far from zero as on data around it.
    """
    cdef double[BATCH] mean
    cdef double[BATCH] scale
    cdef double[BATCH] beta
    cdef double[BATCH] gamma
    cdef double[BATCH] counts
    cdef double k, slope
    cdef double count = 1 if job.operation == POOLED else <double> job.outer * <double> job.inner
    cdef Py_ssize_t c = c0, i, n
    cdef floating* p
    cdef floating* a
    cdef floating* shift
    cdef floating* q
    cdef floating* b
    while c < c1:
        n = min(c1 - c, <Py_ssize_t> BATCH)
        p = table + c
        a = p + stride
        shift = a + stride
        q = shift + stride
        b = q + stride
        for i in range(n):
            counts[i] = count
        if job.operation == TRAIN:
            for i in range(n):
                mean[i] = job.first[c + i]
                scale[i] = job.second[c + i]
        else:
            load_all(&job.mean, c, n, 0, mean)
            load_all(&job.variance, c, n, 1, scale)
        if job.weighs:
            weighted_counts(job, c, n, counts, scale)
        if job.operation == TRAIN:
            for i in range(n):
                scale[i] = scale[i] / counts[i]
        load_all(&job.gamma, c, n, 1, gamma)
        for i in range(n):
            scale[i] = reciprocal_deviation(scale[i], job.epsilon)
        if job.operation == FROZEN:
            for i in range(n):
                p[i] = q[i] = b[i] = shift[i] = 0
                a[i] = <floating> (gamma[i] * scale[i])
        elif job.operation == GRADIENT or job.operation == POOLED:
            # dx = gamma r (dy - sum(dy) / m - (x - mean) r dgamma / m); never r^3, which data far from 1 would take
            # out of range
            for i in range(n):
                k = job.first[c + i] / counts[i]
                slope = -scale[i] * (job.second[c + i] / counts[i] * scale[i])
                a[i] = <floating> (gamma[i] * scale[i])
                p[i] = <floating> (0 if job.weighs else k)
                q[i] = <floating> mean[i]
                b[i] = <floating> slope
                shift[i] = <floating> (-(k - p[i]) - (mean[i] - q[i]) * slope)
        else:
            load_all(&job.beta, c, n, 0, beta)
            for i in range(n):
                q[i] = b[i] = 0
                k = gamma[i] * scale[i]
                a[i] = <floating> k
                p[i] = <floating> mean[i]
                shift[i] = <floating> (beta[i] - (mean[i] - p[i]) * k)
        c += n


cdef inline void weigh_gradient(Job* job) noexcept nogil:
    """Let x count by weights in the gradient, which reads both operands then."""
    job.writes_pair = job.form.pair = True
    job.form.third = job.weights.data != NULL
    job.form.bend = PRESENT if job.operation == FROZEN else WEIGHTED
    job.form.numbers[0] = 0 if job.omits else 1
    job.form.numbers[1] = job.form.numbers[2] = 0


cdef inline Job gate_of(const Job* job) noexcept nogil:
    """The gate as a job of its own, an *apply* on dy: what it is told from is x, or the activation's result as it is."""
    cdef Job gate = job[0]
    gate.operation = NORMALIZE
    gate.form = job.gate
    gate.reduces, gate.applies, gate.writes_pair, gate.streams = False, True, True, False
    gate.y = job.kept
    if job.by_output:
        gate.v = job.w
        gate.gamma.data = gate.beta.data = gate.mean.data = gate.variance.data = NULL
        gate.epsilon = 0
    return gate


cdef inline Job behind_gate(const Job* job) noexcept nogil:
    """What is left of a job when its dy has come through the gate and was kept."""
    cdef Job rest = job[0]
    rest.u = job.kept
    rest.gated = False
    return rest
