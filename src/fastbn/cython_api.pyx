"""The kernels for other Cython modules, by cimport: see cython_api.pxd and docs/cython.md.

Between C pointers and a driver: cheap checks, a job, the driver of its pattern. Jobs are not interruptible, so that a driver
never asks for the GIL and may be called from threads that Python does not know.
"""
from cpython.pycapsule cimport PyCapsule_GetPointer
from cython cimport floating
from libc.float cimport DBL_MAX
from libc.string cimport memset

from .kernels._plan cimport pattern_of, work_of
from .kernels.channels cimport blend
from .kernels.kinds cimport DOUBLE, FLOAT
from .kernels.job cimport DRIVER, FROZEN, GRADIENT, MOMENTS, NORMALIZE, TRAIN, Driver, Job, Operand, Operation, Parameter
from .kernels.moments cimport merge
from .kernels.omp cimport omp_in_parallel

from .kernels import dispatch as _dispatch
from .passes import VALUES_PER_THREAD as _VALUES_PER_THREAD

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX

cdef extern from *:
    """
    #ifdef _WIN32
    #define fastbn_watch_forks() 0
    #define fastbn_is_forked 0
    #else
    #include <pthread.h>
    /* An OpenMP runtime does not survive a fork: from then on everything is done by one thread. */
    static volatile int fastbn_is_forked = 0;
    static void fastbn_in_child(void) { fastbn_is_forked = 1; }
    static int fastbn_watch_forks(void) { return pthread_atfork(NULL, NULL, fastbn_in_child); }
    #endif
    """
    int watch_forks "fastbn_watch_forks"() noexcept
    int is_forked "fastbn_is_forked"

cdef enum:
    MOST_THREADS = 4096  # libgomp ends the process if it cannot start the threads it was asked for

cdef Driver[2] drivers  # in the order of Pattern
cdef Py_ssize_t values_per_thread = _VALUES_PER_THREAD


cdef int connect() except -1:
    """Take the drivers of this process's level."""
    for i, module in enumerate(_dispatch.drivers(_dispatch.level)):
        drivers[<int> i] = <Driver> PyCapsule_GetPointer(module.ENTRY, DRIVER)
    if watch_forks():
        raise MemoryError
    return 0


connect()


cdef int team(Py_ssize_t work, int threads) noexcept nogil:
    """How many threads so much work gets, at most those that were offered."""
    if is_forked or omp_in_parallel():
        return 1
    return max(1, min(min(threads, <int> MOST_THREADS), work // values_per_thread))


cdef bint set_extents(Job* job, Operation operation, Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                      int threads) noexcept nogil:
    memset(job, 0, sizeof(Job))
    if outer < 0 or channels < 0 or inner < 0 or threads < 1:
        return False
    if <double> outer * <double> channels * <double> inner > PY_SSIZE_T_MAX / 16.0:
        return False
    job.operation = operation
    job.outer, job.channels, job.inner = outer, channels, inner
    job.threads = team(work_of(outer, channels, inner, operation != NORMALIZE, operation == GRADIENT or operation == FROZEN),
                       threads)
    return True


cdef bint set_operand(const Job* job, Operand* operand, const floating* data, const Py_ssize_t* strides) noexcept nogil:
    """Whether data are there and aligned; strides of None are those of C order."""
    cdef Py_ssize_t size = sizeof(floating)
    if data == NULL or <size_t> data % sizeof(floating):
        return False
    operand.data = <char*> data
    operand.kind = FLOAT if floating is float else DOUBLE
    operand.size = size
    if strides == NULL:
        operand.inner = size
        operand.channel = job.inner * size
        operand.outer = job.channels * job.inner * size
        return True
    operand.outer, operand.channel, operand.inner = strides[0], strides[1], strides[2]
    return not (strides[0] % size or strides[1] % size or strides[2] % size)


cdef inline bint is_aligned(const floating* data) noexcept nogil:
    """Whether a vector, if there is one, lies as its numbers have to."""
    return <size_t> data % sizeof(floating) == 0


cdef inline bint is_place(const double* data) noexcept nogil:
    """Whether there is a vector, which is aligned."""
    return data != NULL and is_aligned(data)


cdef Parameter vector(const floating* data) noexcept nogil:
    cdef Parameter parameter
    parameter.data = <char*> data
    parameter.stride = sizeof(floating)
    parameter.wide = floating is double
    return parameter


cdef inline bint is_empty(const Job* job) noexcept nogil:
    return job.outer == 0 or job.channels == 0 or job.inner == 0


cdef int carry_out(Job* job, bint wide) noexcept nogil:
    job.reduces = job.operation != NORMALIZE
    job.applies = job.operation != MOMENTS
    job.reads_pair = job.operation == GRADIENT or job.operation == FROZEN
    job.writes_pair = job.form.pair = job.operation == GRADIENT
    return drivers[<int> pattern_of(job.outer, job.inner)](job, wide)


cdef int moments(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, const floating* x, const Py_ssize_t* x_strides,
                 double* mean, double* m2, int threads) noexcept nogil:
    cdef Job job
    if not set_extents(&job, MOMENTS, outer, channels, inner, threads):
        return INVALID
    if channels and not (is_place(mean) and is_place(m2)):
        return INVALID
    if is_empty(&job):
        memset(mean, 0, channels * sizeof(double))
        memset(m2, 0, channels * sizeof(double))
        return DONE
    if not set_operand(&job, &job.u, x, x_strides):
        return INVALID
    job.first, job.second = mean, m2
    return carry_out(&job, floating is double)


cdef int normalize(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, const floating* x, const Py_ssize_t* x_strides,
                   floating* y, const Py_ssize_t* y_strides, const floating* gamma, const floating* beta,
                   const double* mean, const double* variance, double epsilon, int threads) noexcept nogil:
    cdef Job job
    if not set_extents(&job, NORMALIZE, outer, channels, inner, threads):
        return INVALID
    if is_empty(&job):
        return DONE
    if not (is_place(mean) and is_place(variance) and is_aligned(gamma) and is_aligned(beta)):
        return INVALID
    if not (set_operand(&job, &job.u, x, x_strides) and set_operand(&job, &job.y, <const floating*> y, y_strides)):
        return INVALID
    job.gamma, job.beta = vector(gamma), vector(beta)
    job.mean, job.variance = vector(mean), vector(variance)
    job.epsilon = epsilon
    return carry_out(&job, floating is double)


cdef int train(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, const floating* x, const Py_ssize_t* x_strides,
               floating* y, const Py_ssize_t* y_strides, const floating* gamma, const floating* beta,
               double* mean, double* variance, double epsilon, int threads) noexcept nogil:
    cdef Job job
    if not set_extents(&job, TRAIN, outer, channels, inner, threads):
        return INVALID
    if channels and not (is_place(mean) and is_place(variance) and is_aligned(gamma) and is_aligned(beta)):
        return INVALID
    if is_empty(&job):
        memset(mean, 0, channels * sizeof(double))
        memset(variance, 0, channels * sizeof(double))
        return DONE
    if not (set_operand(&job, &job.u, x, x_strides) and set_operand(&job, &job.y, <const floating*> y, y_strides)):
        return INVALID
    job.gamma, job.beta = vector(gamma), vector(beta)
    job.first, job.second = mean, variance
    job.epsilon = epsilon
    job.settles = True
    return carry_out(&job, floating is double)


cdef int gradient(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner, const floating* dy, const Py_ssize_t* dy_strides,
                  const floating* x, const Py_ssize_t* x_strides, floating* dx, const Py_ssize_t* dx_strides,
                  const floating* gamma, const double* mean, const double* variance, double epsilon, int frozen,
                  floating* dgamma, floating* dbeta, int threads) noexcept nogil:
    cdef Job job
    if not set_extents(&job, FROZEN if frozen else GRADIENT, outer, channels, inner, threads):
        return INVALID
    if not (is_aligned(<const floating*> dgamma) and is_aligned(<const floating*> dbeta)):
        return INVALID
    if is_empty(&job):
        if dgamma != NULL:
            memset(dgamma, 0, channels * sizeof(floating))
        if dbeta != NULL:
            memset(dbeta, 0, channels * sizeof(floating))
        return DONE
    if not (is_place(mean) and is_place(variance) and is_aligned(gamma)):
        return INVALID
    if not (set_operand(&job, &job.u, dy, dy_strides) and set_operand(&job, &job.v, x, x_strides)
            and set_operand(&job, &job.y, <const floating*> dx, dx_strides)):
        return INVALID
    job.gamma = vector(gamma)
    job.mean, job.variance = vector(mean), vector(variance)
    job.dgamma, job.dbeta = vector(<const floating*> dgamma), vector(<const floating*> dbeta)
    job.epsilon = epsilon
    return carry_out(&job, floating is double)


cdef int moments_float(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                       const float* x, const Py_ssize_t* x_strides,
                       double* mean, double* m2, int threads) noexcept nogil:
    return moments(outer, channels, inner, x, x_strides, mean, m2, threads)


cdef int moments_double(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                        const double* x, const Py_ssize_t* x_strides,
                        double* mean, double* m2, int threads) noexcept nogil:
    return moments(outer, channels, inner, x, x_strides, mean, m2, threads)


cdef int normalize_float(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                         const float* x, const Py_ssize_t* x_strides, float* y, const Py_ssize_t* y_strides,
                         const float* gamma, const float* beta, const double* mean, const double* variance,
                         double epsilon, int threads) noexcept nogil:
    return normalize(outer, channels, inner, x, x_strides, y, y_strides, gamma, beta, mean, variance, epsilon, threads)


cdef int normalize_double(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                          const double* x, const Py_ssize_t* x_strides, double* y, const Py_ssize_t* y_strides,
                          const double* gamma, const double* beta, const double* mean, const double* variance,
                          double epsilon, int threads) noexcept nogil:
    return normalize(outer, channels, inner, x, x_strides, y, y_strides, gamma, beta, mean, variance, epsilon, threads)


cdef int train_float(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                     const float* x, const Py_ssize_t* x_strides, float* y, const Py_ssize_t* y_strides,
                     const float* gamma, const float* beta, double* mean, double* variance,
                     double epsilon, int threads) noexcept nogil:
    return train(outer, channels, inner, x, x_strides, y, y_strides, gamma, beta, mean, variance, epsilon, threads)


cdef int train_double(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                      const double* x, const Py_ssize_t* x_strides, double* y, const Py_ssize_t* y_strides,
                      const double* gamma, const double* beta, double* mean, double* variance,
                      double epsilon, int threads) noexcept nogil:
    return train(outer, channels, inner, x, x_strides, y, y_strides, gamma, beta, mean, variance, epsilon, threads)


cdef int gradient_float(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                        const float* dy, const Py_ssize_t* dy_strides, const float* x, const Py_ssize_t* x_strides,
                        float* dx, const Py_ssize_t* dx_strides,
                        const float* gamma, const double* mean, const double* variance, double epsilon, int frozen,
                        float* dgamma, float* dbeta, int threads) noexcept nogil:
    return gradient(outer, channels, inner, dy, dy_strides, x, x_strides, dx, dx_strides, gamma, mean, variance, epsilon,
                    frozen, dgamma, dbeta, threads)


cdef int gradient_double(Py_ssize_t outer, Py_ssize_t channels, Py_ssize_t inner,
                         const double* dy, const Py_ssize_t* dy_strides, const double* x, const Py_ssize_t* x_strides,
                         double* dx, const Py_ssize_t* dx_strides,
                         const double* gamma, const double* mean, const double* variance, double epsilon, int frozen,
                         double* dgamma, double* dbeta, int threads) noexcept nogil:
    return gradient(outer, channels, inner, dy, dy_strides, x, x_strides, dx, dx_strides, gamma, mean, variance, epsilon,
                    frozen, dgamma, dbeta, threads)


cdef int update_moving(Py_ssize_t channels, double* moving_mean, double* moving_variance,
                       const double* mean, const double* variance, double count, int ddof,
                       double momentum) noexcept nogil:
    cdef Parameter old_mean = vector(<const double*> moving_mean), old_variance = vector(<const double*> moving_variance)
    cdef Parameter new_mean = vector(mean), new_variance = vector(variance)
    if channels < 0 or not 0 <= count <= DBL_MAX or not (ddof == 0 or ddof == 1) or not 0 <= momentum <= 1:
        return INVALID
    if channels == 0 or count == 0:
        return DONE
    if not (is_place(moving_mean) and is_place(moving_variance) and is_place(mean) and is_place(variance)):
        return INVALID
    blend(&old_mean, &old_variance, &new_mean, &new_variance, channels, (count - ddof) / count if count > ddof else 1, momentum)
    return DONE


cdef int merge_moments(Py_ssize_t channels, double count, double* mean, double* m2,
                       double other_count, const double* other_mean, const double* other_m2) noexcept nogil:
    cdef Py_ssize_t c
    if channels < 0 or not 0 <= count <= DBL_MAX or not 0 <= other_count <= DBL_MAX:
        return INVALID
    if channels == 0 or other_count == 0:
        return DONE
    if not (is_place(mean) and is_place(m2) and is_place(other_mean) and is_place(other_m2)):
        return INVALID
    if count == 0:
        for c in range(channels):
            mean[c] = other_mean[c]
            m2[c] = other_m2[c]
        return DONE
    merge(count, mean, m2, other_count, other_mean, other_m2, channels)
    return DONE
