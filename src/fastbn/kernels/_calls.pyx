"""Calls that plainly fit go straight to a driver: no Python between the arguments and the kernel.

A small batch is normalized in a fraction of a microsecond, in which Python checks a single argument. The functions
here look at all of them in C and either carry out the call or return None, having touched nothing. Then the checks of the face
decide; so there is one place that knows what is allowed, and this module only has to know what certainly is: arrays that
are ndarrays in C order, native and aligned, of the right shapes, whose memory does not meet where it must not.
"""
from cpython.bool cimport PyBool_Check
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.long cimport PyLong_AsLongAndOverflow, PyLong_CheckExact
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.float cimport DBL_MAX
from libc.math cimport isfinite
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cimport numpy as cnp

from ._memory cimport empty_like
from ._plan cimport Pattern, pattern_of, streams
from .convert cimport DOUBLE, FLOAT
from .job cimport (
    DRIVER, FROZEN, GRADIENT, NORMALIZE, TRAIN, Driver, Job, Operand, Parameter, blend, finish, load_all,
    to_parameter_gradients,
)

cnp.import_array()

cdef enum:
    ON_STACK = 128  # channels whose statistics need no allocation

cdef Driver[2] drivers  # in the order of Pattern


def connect(planar, interleaved):
    """Take the entries of the driver modules of the chosen level."""
    drivers[0] = <Driver> PyCapsule_GetPointer(planar, DRIVER)
    drivers[1] = <Driver> PyCapsule_GetPointer(interleaved, DRIVER)


cdef inline bint is_plain(object array) noexcept:
    return cnp.PyArray_CheckExact(array) and cnp.PyArray_ISCARRAY_RO(<cnp.ndarray> array)


cdef inline bint is_real(cnp.ndarray array) noexcept:
    return cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32 or cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64


cdef bint bind(Parameter* parameter, object array, Py_ssize_t channels) noexcept:
    """Whether it is None or a vector of a value per channel."""
    if array is None:
        parameter.data = NULL
        return True
    if not (is_plain(array) and is_real(<cnp.ndarray> array) and cnp.PyArray_NDIM(<cnp.ndarray> array) == 1
            and cnp.PyArray_DIMS(<cnp.ndarray> array)[0] == channels):
        return False
    parameter.data = <char*> cnp.PyArray_DATA(<cnp.ndarray> array)
    parameter.stride = cnp.PyArray_ITEMSIZE(<cnp.ndarray> array)
    parameter.wide = parameter.stride == 8
    return True


cdef inline bint apart(const char* a, Py_ssize_t a_bytes, const char* b, Py_ssize_t b_bytes) noexcept:
    return a + a_bytes <= b or b + b_bytes <= a


cdef inline bint apart_from(const char* y, Py_ssize_t bytes, const Parameter* p, Py_ssize_t channels) noexcept:
    return p.data == NULL or apart(y, bytes, p.data, channels * p.stride)


cdef bint in_range(object value, double low, double high, double* number) noexcept:
    if not PyFloat_CheckExact(value):
        return False
    number[0] = PyFloat_AS_DOUBLE(value)
    return low <= number[0] <= high and isfinite(number[0])


cdef bint set_shape(Job* job, cnp.ndarray x, object axis) noexcept:
    """The canonical form of an array in C order, or False if it is empty or the axis is not one of it."""
    cdef Py_ssize_t i, at, ndim = cnp.PyArray_NDIM(x)
    cdef int overflow = 0
    cdef long given
    if not PyLong_CheckExact(axis):
        return False
    given = PyLong_AsLongAndOverflow(axis, &overflow)
    if overflow or not -ndim <= given < ndim:
        return False
    at = given + ndim if given < 0 else given
    job.outer = job.inner = 1
    for i in range(ndim):
        if i < at:
            job.outer *= cnp.PyArray_DIMS(x)[i]
        elif i > at:
            job.inner *= cnp.PyArray_DIMS(x)[i]
    job.channels = cnp.PyArray_DIMS(x)[at]
    return job.outer * job.channels * job.inner > 0


cdef inline void in_order(Job* job, Operand* operand, cnp.ndarray array) noexcept:
    operand.data = <char*> cnp.PyArray_DATA(array)
    operand.size = cnp.PyArray_ITEMSIZE(array)
    operand.kind = DOUBLE if operand.size == 8 else FLOAT
    operand.inner = operand.size
    operand.channel = job.inner * operand.inner
    operand.outer = job.channels * operand.channel


cdef bint is_like(object array, cnp.ndarray x) noexcept:
    """Whether it is a plain array of x's shape and type."""
    cdef Py_ssize_t i
    if not is_plain(array):
        return False
    if cnp.PyArray_TYPE(<cnp.ndarray> array) != cnp.PyArray_TYPE(x):
        return False
    if cnp.PyArray_NDIM(<cnp.ndarray> array) != cnp.PyArray_NDIM(x):
        return False
    for i in range(cnp.PyArray_NDIM(x)):
        if cnp.PyArray_DIMS(<cnp.ndarray> array)[i] != cnp.PyArray_DIMS(x)[i]:
            return False
    return True


cdef inline bint same_or_apart(const char* a, const char* b, Py_ssize_t bytes) noexcept:
    return a == b or apart(a, bytes, b, bytes)


cdef int carry_out(Job* job, bint wide, threads, Py_ssize_t serial) except -1:
    """Hand a job whose operands and parameters are set to the driver of its pattern."""
    cdef Pattern pattern = pattern_of(job.inner)
    cdef Py_ssize_t size = job.outer * job.channels * job.inner
    job.reduces = job.operation != NORMALIZE
    job.applies = True
    job.reads_pair = job.operation == GRADIENT or job.operation == FROZEN
    job.writes_pair = job.form.pair = job.operation == GRADIENT
    job.streams = streams(job)
    job.threads = 1 if size <= serial else threads(size)
    job.interruptible = True
    cdef int status
    with nogil:
        status = drivers[<int> pattern](job, wide)
    return finish(status)


cdef int train(Job* job, bint wide, threads, Py_ssize_t serial, int ddof, double share) except -1:
    """Carry out a training pass, leave mean and variance in first and second, and update the moving statistics, if any."""
    cdef Parameter first, second
    cdef double count = <double> job.outer * <double> job.inner
    cdef Py_ssize_t i
    carry_out(job, wide, threads, serial)
    for i in range(job.channels):
        job.second[i] = job.second[i] / count
    if job.mean.data != NULL:
        first.data, second.data = <char*> job.first, <char*> job.second
        first.stride = second.stride = sizeof(double)
        first.wide = second.wide = True
        blend(&job.mean, &job.variance, &first, &second, job.channels, max(count - ddof, 1.0) / count, share)
    return 0


def forward(x, gamma, beta, moving_mean, moving_variance, training, momentum, epsilon, axis, ddof, update, out,
            bint keep, bint in_place, threads, Py_ssize_t serial):
    """Carry out `fastbn.batch_norm`, or return None where the full checks have to decide.

    Parameters
    ----------
    x, gamma, beta, moving_mean, moving_variance, training, momentum, epsilon, axis, ddof, update, out
        As the user gave them.
    keep : bool
        Whether to return as well what the gradient needs.
    in_place : bool
        Whether it may be x that is overwritten.
    threads : callable
        Returns the size of the team for large batches, from the number of values.
    serial : int
        Values up to which a batch is worked on by one thread.

    Returns
    -------
    ndarray, tuple or None
        y; with ``keep`` (y, kept), where kept are the arguments of `fastbn.passes.Cache`, with None for an x that was
        overwritten.
    """
    cdef Job job
    cdef cnp.ndarray source, target, mean = None, variance = None
    cdef object result
    cdef Py_ssize_t bytes
    cdef double share
    cdef bint trains, wide
    cdef double[2 * ON_STACK] on_stack
    cdef double* statistics = on_stack
    if not (is_plain(x) and is_real(<cnp.ndarray> x) and PyBool_Check(training) and update is True
            and PyLong_CheckExact(ddof) and (ddof == 0 or ddof == 1)):
        return None
    memset(&job, 0, sizeof(job))
    source = <cnp.ndarray> x
    trains = training is True
    if not (in_range(momentum, 0, 1, &share) and in_range(epsilon, 0, DBL_MAX, &job.epsilon)
            and set_shape(&job, source, axis)):
        return None
    if not (bind(&job.gamma, gamma, job.channels) and bind(&job.beta, beta, job.channels)
            and bind(&job.mean, moving_mean, job.channels) and bind(&job.variance, moving_variance, job.channels)):
        return None
    if (job.mean.data == NULL) != (job.variance.data == NULL) or (not trains and job.mean.data == NULL):
        return None
    if trains and job.mean.data != NULL and not (
            cnp.PyArray_ISWRITEABLE(<cnp.ndarray> moving_mean) and cnp.PyArray_ISWRITEABLE(<cnp.ndarray> moving_variance)
            and apart_from(job.mean.data, job.channels * job.mean.stride, &job.variance, job.channels)):
        return None
    wide = cnp.PyArray_ITEMSIZE(source) == 8
    bytes = cnp.PyArray_NBYTES(source)
    in_order(&job, &job.u, source)
    if keep and not (apart_from(job.u.data, bytes, &job.mean, job.channels)
                     and apart_from(job.u.data, bytes, &job.variance, job.channels)):
        return None  # what is kept refers to x
    if out is None:
        target = <cnp.ndarray> empty_like(source)
        in_order(&job, &job.y, target)
    else:
        if not is_like(out, source):
            return None
        target = <cnp.ndarray> out
        in_order(&job, &job.y, target)
        if not (cnp.PyArray_ISWRITEABLE(target) and same_or_apart(job.y.data, job.u.data, bytes)
                and apart_from(job.y.data, bytes, &job.gamma, job.channels)
                and apart_from(job.y.data, bytes, &job.beta, job.channels)
                and apart_from(job.y.data, bytes, &job.mean, job.channels)
                and apart_from(job.y.data, bytes, &job.variance, job.channels)):
            return None
        if job.y.data == job.u.data and not in_place:
            return None
    job.operation = TRAIN if trains else NORMALIZE
    result = target
    if keep:
        mean = <cnp.ndarray> cnp.PyArray_EMPTY(1, <cnp.npy_intp*> &job.channels, cnp.NPY_FLOAT64, 0)
        variance = <cnp.ndarray> cnp.PyArray_EMPTY(1, <cnp.npy_intp*> &job.channels, cnp.NPY_FLOAT64, 0)
        result = (target, (None if job.y.data == job.u.data else x, (axis if axis >= 0 else axis + source.ndim,),
                           "train" if trains else "inference", (mean, variance),
                           None if gamma is None else cnp.PyArray_NewCopy(<cnp.ndarray> gamma, cnp.NPY_CORDER),
                           epsilon))
    if not trains:
        if keep:
            load_all(&job.mean, 0, job.channels, 0, <double*> cnp.PyArray_DATA(mean))
            load_all(&job.variance, 0, job.channels, 0, <double*> cnp.PyArray_DATA(variance))
        carry_out(&job, wide, threads, serial)
        return result
    if job.channels > ON_STACK and not keep:
        statistics = <double*> malloc(2 * job.channels * sizeof(double))
        if statistics == NULL:
            raise MemoryError
    job.first, job.second = statistics, statistics + job.channels
    if keep:
        job.first, job.second = <double*> cnp.PyArray_DATA(mean), <double*> cnp.PyArray_DATA(variance)
    try:
        train(&job, wide, threads, serial, ddof, share)
    finally:
        if statistics != on_stack:
            free(statistics)
    return result


def backward(dy, x, axis, gamma, mean, variance, double epsilon, bint frozen, out, threads, Py_ssize_t serial):
    """Carry out `fastbn.batch_norm_backward`, or return None where the full checks have to decide.

    Parameters
    ----------
    dy, out
        As the user gave them.
    x, gamma, mean, variance, epsilon
        Of the cache: checked arrays, parameters of one axis.
    axis : int
        The channel axis.
    frozen : bool
        Whether the statistics were constants.
    threads, serial
        As in `forward`.

    Returns
    -------
    tuple or None
        dx, dgamma, dbeta.
    """
    cdef Job job
    cdef cnp.ndarray source, target, dgamma, dbeta
    cdef Py_ssize_t bytes
    cdef double[2 * ON_STACK] on_stack
    cdef double* sums = on_stack
    cdef Parameter scale, shift
    if not (is_plain(x) and is_real(<cnp.ndarray> x) and is_like(dy, <cnp.ndarray> x)):
        return None
    memset(&job, 0, sizeof(job))
    source = <cnp.ndarray> x
    if not set_shape(&job, source, axis):
        return None
    if not (bind(&job.gamma, gamma, job.channels) and bind(&job.mean, mean, job.channels)
            and bind(&job.variance, variance, job.channels)):
        return None
    bytes = cnp.PyArray_NBYTES(source)
    in_order(&job, &job.u, <cnp.ndarray> dy)
    in_order(&job, &job.v, source)
    if out is None:
        target = <cnp.ndarray> empty_like(source)
        in_order(&job, &job.y, target)
    else:
        if not is_like(out, source):
            return None
        target = <cnp.ndarray> out
        in_order(&job, &job.y, target)
        if not (cnp.PyArray_ISWRITEABLE(target) and same_or_apart(job.y.data, job.u.data, bytes)
                and same_or_apart(job.y.data, job.v.data, bytes)):
            return None
    job.operation = FROZEN if frozen else GRADIENT
    job.epsilon = epsilon
    dgamma = <cnp.ndarray> cnp.PyArray_EMPTY(1, <cnp.npy_intp*> &job.channels, cnp.PyArray_TYPE(source), 0)
    dbeta = <cnp.ndarray> cnp.PyArray_EMPTY(1, <cnp.npy_intp*> &job.channels, cnp.PyArray_TYPE(source), 0)
    bind(&scale, dgamma, job.channels)
    bind(&shift, dbeta, job.channels)
    if job.channels > ON_STACK:
        sums = <double*> malloc(2 * job.channels * sizeof(double))
        if sums == NULL:
            raise MemoryError
    job.first, job.second = sums, sums + job.channels
    try:
        carry_out(&job, cnp.PyArray_ITEMSIZE(source) == 8, threads, serial)
        to_parameter_gradients(&job, &scale, &shift)
    finally:
        if sums != on_stack:
            free(sums)
    return target, dgamma, dbeta
