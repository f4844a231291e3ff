from .job cimport Job, Operation, Parameter
from .strips cimport STRAIGHT, Form


cdef enum Pattern:
    PLANAR
    INTERLEAVED


cdef enum:
    # Runs of up to this many values would leave the lanes of the planar primitives half empty: such an array is
    # walked as interleaved, every (channel, inner) pair being a column; with no more columns in a channel than rows,
    SHORT_RUN = 16
    MIDDLE_RUN = 32  # also one of runs up to this.
    # What is done for a channel takes as long as so many values of an inference: its coefficients,
    CHANNEL = 7
    RUNS = 70  # and of a planar one the sums of its lanes.
    # Work for which two teams are started; less of it is done by one thread, and so what one core has summed stays near it.
    TWICE = 5 << 14


cdef inline Pattern pattern_of(Py_ssize_t outer, Py_ssize_t inner) noexcept nogil:
    """By shape alone, so that strides never decide the order of additions."""
    return INTERLEAVED if inner <= SHORT_RUN or inner <= min(outer, <Py_ssize_t> MIDDLE_RUN) else PLANAR


cdef inline Py_ssize_t work_of(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, bint reduces,
                               bint reads_pair) noexcept nogil:
    """How much there is to do, in values of an inference: what the number of threads follows."""
    cdef Py_ssize_t size = outer * channels * inner
    return (size + (size // 4 if reduces else 0) + (size // 4 if reads_pair else 0)
            + channels * (RUNS if reduces and pattern_of(outer, inner) == PLANAR else CHANNEL))


cdef inline bint too_little(const Job* job) noexcept nogil:
    """Whether one thread is to do what would take a team to sum, and another one to apply."""
    return (job.threads > 1 and job.reduces and job.applies
            and work_of(job.outer, job.channels, job.inner, True, job.reads_pair) < TWICE)


cdef inline int set_bend(Form* form, object bend) except -1:
    """An activation: a number of `BENDS`, and three numbers."""
    kind, numbers = bend
    form.bend = kind
    form.numbers[0], form.numbers[1], form.numbers[2] = numbers
    return 0


cdef inline void set_gate(Job* job, bint third) noexcept nogil:
    """Let dy come first through the derivative of the activation that the form has; third is whether a residual is read."""
    job.gated = True
    job.gate = job.form
    job.gate.pair = True
    job.gate.third = third
    job.form.third = False
    job.form.bend = STRAIGHT


cdef class Plan:
    cdef readonly Py_ssize_t outer, channels, inner
    cdef readonly int kind
    cdef readonly bint wide
    cdef readonly Pattern pattern
    cdef Py_ssize_t[3] u_strides
    cdef Py_ssize_t[3] v_strides
    cdef Py_ssize_t[3] w_strides
    cdef Py_ssize_t[3] y_strides
    cdef Py_ssize_t[3] kept_strides

    cdef int bind(self, Job* job, Operation operation, u, v, y, gamma, beta, mean, variance, double epsilon,
                  first, second, int threads, w, bend, bint by_output, kept) except -1


cdef int bind_weights(Job* job, counting) except -1
cdef int bind_parameter(Parameter* parameter, array) except -1
