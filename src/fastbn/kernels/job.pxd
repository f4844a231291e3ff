"""What a driver is told: operands, parameters, and where its numbers per channel go."""
from cython cimport floating
from libc.math cimport INFINITY

from .kinds cimport BFLOAT, DOUBLE, FLOAT, HALF
from .packs cimport HAS_SMALL_PACKS
from .strips cimport PRESENT, SMOOTH, WEIGHTED, Form

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
    bint streams      # y is stored past the caches: see stores.pxd
    bint fresh        # nobody will see y if the job ends in failure
    bint trains       # a network: its other layers work between two such jobs, so that no cache holds where y goes
    Py_ssize_t outer, channels, inner
    Operand u, v, w, y  # w is the residual, or the result of the activation
    Operand kept        # where the gated dy goes; in no memory where nobody wants it
    Operand exact       # where it is as it was summed, for results: see stores.pxd; in no memory where it is found again for them
    Parameter gamma, beta, mean, variance
    double epsilon
    double* first   # per channel: mean, or sum(dy); NULL where nobody keeps them: the driver has a place for both then,
    double* second  # per channel: m2, or sum(dy * (x - mean))
    bint weighs     # values count by weights, or not at all where they are missing: see weights.pxd
    bint omits      # NaN is missing
    Weights weights
    double* total   # per channel: sum of weights; found by sums of x, where first is wanted, and given to the gradient
    bint settles    # TRAIN: leave the variance in second, and let mean and variance, then the moving ones, learn:
    double keeps    # so much of the old stays,
    int ddof        # and so many values less are divided by
    Parameter dgamma, dbeta  # of GRADIENT and FROZEN; NULL where nobody wants them
    int threads
    bint interruptible  # whether to look for signals between waves, which takes the GIL


cdef enum Status:
    DONE
    NO_MEMORY
    INTERRUPTED  # a signal handler raised: the exception is set
    UNFIT        # unchecked weights cannot be summed as they are: nothing but statistics and a fresh y was written


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


cdef inline void move(Operand* operand, Py_ssize_t channels) noexcept nogil:
    if operand.data != NULL:
        operand.data += channels * operand.channel


cdef inline void skip(Parameter* parameter, Py_ssize_t channels) noexcept nogil:
    if parameter.data != NULL:
        parameter.data += channels * parameter.stride


cdef inline Job channels_of(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    """Channels c0..c1 as a job of their own."""
    cdef Job own = job[0]
    own.channels = c1 - c0
    move(&own.u, c0)
    move(&own.v, c0)
    move(&own.w, c0)
    move(&own.y, c0)
    move(&own.kept, c0)
    move(&own.exact, c0)
    skip(&own.gamma, c0)
    skip(&own.beta, c0)
    skip(&own.mean, c0)
    skip(&own.variance, c0)
    skip(&own.dgamma, c0)
    skip(&own.dbeta, c0)
    if own.first != NULL:
        own.first += c0
        own.second += c0
    if own.total != NULL:
        own.total += c0
    if own.weights.data != NULL:
        own.weights.data += c0 * own.weights.channel
    return own


cdef inline Py_ssize_t summed(const Job* job) noexcept nogil:
    """Operands as large as x that sums read."""
    cdef bint weighted = job.weights.data != NULL and not job.weights.marks and (job.weights.channel != 0 or job.weights.inner != 0)
    return 2 if job.reads_pair or weighted else 1


cdef inline int native(const floating* typed) noexcept nogil:
    """The kind that is computed in; typed only names the type."""
    return FLOAT if floating is float else DOUBLE


cdef inline int kind_of_results(const Job* job) noexcept nogil:
    """The kind that *apply* reads and writes in place: that of the result, or what is computed in, if others are staged."""
    cdef int kind = job.y.kind
    if kind <= DOUBLE:
        return kind
    if (HAS_SMALL_PACKS and not job.gated and job.form.bend <= SMOOTH and job.u.kind == kind_beside(&job.form, &job.u, kind)
            and (not job.form.pair or job.v.kind == kind) and (not job.form.third or job.w.kind == kind)):
        return kind
    return FLOAT


cdef inline int kind_beside(const Form* form, const Operand* u, int kind) noexcept nogil:
    """The kind in which *apply* reads u where its other operands and y are of that kind: see `strips_of_kind`."""
    if kind > DOUBLE:
        return FLOAT if form.pair and u.kind == FLOAT else kind
    if HAS_SMALL_PACKS and form.pair and form.bend == SMOOTH and (u.kind == HALF or u.kind == BFLOAT):
        return u.kind
    return kind


cdef inline void weigh_gradient(Job* job) noexcept nogil:
    """Let x count by weights in the gradient, which reads both operands then."""
    job.writes_pair = job.form.pair = True
    job.form.third = job.weights.data != NULL
    job.form.bend = PRESENT if job.operation == FROZEN else WEIGHTED
    job.form.numbers[0] = 0 if job.omits else 1
    job.form.numbers[1] = 1 if job.weights.marks else INFINITY
    job.form.numbers[2] = 0


cdef inline Job gate_of(const Job* job) noexcept nogil:
    """The gate as a job of its own, an *apply* on dy: what it is told from is x, or the activation's result as it is."""
    cdef Job gate = job[0]
    gate.operation = NORMALIZE
    gate.form = job.gate
    gate.reduces, gate.applies, gate.writes_pair, gate.streams = False, True, True, False
    gate.dgamma.data = gate.dbeta.data = NULL
    gate.y = job.exact
    if job.by_output:
        gate.v = job.w
        gate.gamma.data = gate.beta.data = gate.mean.data = gate.variance.data = NULL
        gate.epsilon = 0
    return gate


cdef inline Job behind_gate(const Job* job) noexcept nogil:
    """What is left of a job when its dy has come through the gate once: what is kept exactly does not go again."""
    cdef Job rest = job[0]
    if job.gated and job.exact.data != NULL:
        rest.u = job.exact
        rest.gated = False
    rest.kept.data = rest.exact.data = NULL
    return rest
