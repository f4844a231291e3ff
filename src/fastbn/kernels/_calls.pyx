"""Calls that plainly fit go straight to a driver: no Python between the arguments and the kernel.

A small batch is normalized in a fraction of a microsecond, in which Python checks a single argument. The functions
here look at all of them in C and either carry out the call or return None, having touched nothing. Then the checks of the face
decide; so there is one place that knows what is allowed, and this module only has to know what certainly is: arrays that
are ndarrays in C order, native and aligned, of the right shapes, whose memory does not meet where it must not.
"""
from cpython.bool cimport PyBool_Check
from cpython.long cimport PyLong_CheckExact
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.float cimport DBL_MAX
from libc.string cimport memset

cimport numpy as cnp

from ._memory cimport empty_like
from ._plan cimport Pattern, bind_weights, pattern_of, set_bend, set_gate, work_of
from .channels cimport load_all
from .kinds cimport UINT8
from .job cimport DRIVER, FROZEN, GRADIENT, NORMALIZE, TRAIN, Driver, Job, finish, weigh_gradient
from .plain cimport (
    apart, apart_from, apart_from_array, bind, extent, in_order, in_range, is_plain, is_result, kind_of, learns_apart, same_or_apart,
    set_shape, set_weights, type_of_result,
)

cnp.import_array()

cdef Driver[2] drivers  # in the order of Pattern


def connect(planar, interleaved):
    """Take the entries of the driver modules of the chosen level."""
    drivers[0] = <Driver> PyCapsule_GetPointer(planar, DRIVER)
    drivers[1] = <Driver> PyCapsule_GetPointer(interleaved, DRIVER)


cdef inline cnp.ndarray result_like(cnp.ndarray x):
    """A new array for what comes of x."""
    if cnp.PyArray_TYPE(x) == type_of_result(x):
        return empty_like(x)
    return empty_like(x, <cnp.dtype> cnp.PyArray_DescrFromType(type_of_result(x)))


cdef inline object copy_of(object parameter):
    return None if parameter is None else cnp.PyArray_NewCopy(<cnp.ndarray> parameter, cnp.NPY_CORDER)


cdef int carry_out(Job* job, bint wide, threads, Py_ssize_t serial) except -1:
    """Hand a job whose operands, parameters and weights are set to the driver of its pattern; 1 if the weights are unfit."""
    cdef Pattern pattern = pattern_of(job.outer, job.inner)
    cdef Py_ssize_t work
    job.reduces = job.operation != NORMALIZE
    job.applies = True
    job.reads_pair = job.operation == GRADIENT or job.operation == FROZEN
    job.writes_pair = job.form.pair = job.operation == GRADIENT
    if job.weighs and job.reads_pair:
        weigh_gradient(job)
    work = work_of(job.outer, job.channels, job.inner, job.reduces, job.reads_pair)
    job.threads = 1 if work <= serial else threads(work)
    job.interruptible = True
    cdef int status
    with nogil:
        status = drivers[<int> pattern](job, wide)
    return finish(status)


cdef bint has_weight(const Job* job) noexcept:
    """Whether anything counts in any channel."""
    cdef Py_ssize_t c
    for c in range(job.channels):
        if job.total[c] != 0:
            return True
    return False


def forward(x, gamma, beta, moving_mean, moving_variance, training, momentum, epsilon, axis, ddof, update, out,
            bint keep, bint in_place, threads, Py_ssize_t serial, mask=None, sample_weight=None, nan_policy="propagate",
            bent=None, residual=None, layer=None):
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
        Returns the size of the team for large batches, from the work there is (`work_of` in _plan.pxd).
    serial : int
        Work that one thread does at most.
    mask, sample_weight, nan_policy, residual
        As the user gave them.
    bent : fastbn.activation.Activation, optional
        The activation.
    layer : fastbn.BatchNorm, optional
        What counts its batches, together with the update of its statistics: here no signal handler can come in between.

    Returns
    -------
    ndarray, tuple or None
        y; with ``keep`` (y, kept, total), where kept are the arguments of `fastbn.passes.Cache`, with None for an x that
        was overwritten, and total is the sum of weights per channel, None where all values count alike.
    """
    cdef Job job
    cdef cnp.ndarray source, target, mean = None, variance = None, total = None
    cdef cnp.ndarray given = None
    cdef object result
    cdef Py_ssize_t bytes, y_bytes
    cdef bint trains, wide, by_output
    if not (is_plain(x) and kind_of(<cnp.ndarray> x) >= 0 and PyBool_Check(training) and update is True
            and PyLong_CheckExact(ddof) and (ddof == 0 or ddof == 1)):
        return None
    memset(&job, 0, sizeof(job))
    source = <cnp.ndarray> x
    trains = training is True
    if not (in_range(momentum, 0, 1, &job.keeps) and in_range(epsilon, 0, DBL_MAX, &job.epsilon)
            and set_shape(&job, source, axis)
            and set_weights(&job, source, axis, mask, sample_weight, nan_policy)):
        return None
    if job.weighs and not (trains and bent is None and residual is None):
        return None
    if not (bind(&job.gamma, gamma, job.channels) and bind(&job.beta, beta, job.channels)
            and bind(&job.mean, moving_mean, job.channels) and bind(&job.variance, moving_variance, job.channels)):
        return None
    if (job.mean.data == NULL) != (job.variance.data == NULL) or (not trains and job.mean.data == NULL):
        return None
    wide = cnp.PyArray_ITEMSIZE(source) == 8
    bytes = cnp.PyArray_NBYTES(source)
    in_order(&job, &job.u, source)
    if residual is not None:
        if kind_of(source) >= UINT8 or not is_result(residual, source):
            return None
        in_order(&job, &job.w, <cnp.ndarray> residual)
        job.form.third = True
    if trains and job.mean.data != NULL and not (
            cnp.PyArray_ISWRITEABLE(<cnp.ndarray> moving_mean) and cnp.PyArray_ISWRITEABLE(<cnp.ndarray> moving_variance)
            and learns_apart(&job, bytes)):
        return None
    if job.weights.data != NULL:
        given = <cnp.ndarray> (mask if sample_weight is None else sample_weight)
        if job.mean.data != NULL and not (apart_from_array(job.mean.data, extent(&job.mean, job.channels), given)
                                          and apart_from_array(job.variance.data, extent(&job.variance, job.channels), given)):
            return None
    if out is None:
        target = result_like(source)
        in_order(&job, &job.y, target)
        job.fresh = True
    else:
        if not is_result(out, source):
            return None
        target = <cnp.ndarray> out
        y_bytes = cnp.PyArray_NBYTES(target)
        in_order(&job, &job.y, target)
        if not (cnp.PyArray_ISWRITEABLE(target) and same_or_apart(job.y.data, y_bytes, job.u.data, bytes)
                and apart_from(job.y.data, y_bytes, &job.gamma, job.channels)
                and apart_from(job.y.data, y_bytes, &job.beta, job.channels)
                and apart_from(job.y.data, y_bytes, &job.mean, job.channels)
                and apart_from(job.y.data, y_bytes, &job.variance, job.channels)):
            return None
        if job.y.data == job.u.data and not in_place:
            return None
        if residual is not None and not (apart(job.y.data, y_bytes, job.w.data, y_bytes)
                                         or (not keep and job.y.data == job.w.data)):
            return None
        if given is not None and not apart_from_array(job.y.data, y_bytes, given):
            return None
    job.operation = TRAIN if trains else NORMALIZE
    job.settles = trains
    job.ddof = ddof
    if bent is not None:
        set_bend(&job.form, bent[0])
    result = target
    if keep:
        mean = <cnp.ndarray> cnp.PyArray_EMPTY(1, <cnp.npy_intp*> &job.channels, cnp.NPY_FLOAT64, 0)
        variance = <cnp.ndarray> cnp.PyArray_EMPTY(1, <cnp.npy_intp*> &job.channels, cnp.NPY_FLOAT64, 0)
        if job.weighs:
            total = <cnp.ndarray> cnp.PyArray_EMPTY(1, <cnp.npy_intp*> &job.channels, cnp.NPY_FLOAT64, 0)
        result = (target, (None if job.y.data == job.u.data else x, (axis if axis >= 0 else axis + source.ndim,),
                           "train" if trains else "inference", (mean, variance),
                           copy_of(gamma), epsilon), total)
        if bent is not None or residual is not None:
            # The derivative is told from y alone, or beside x from beta and the residual.
            by_output = bent is not None and bent[1] and residual is not None
            result = (target, result[1] + (None, bent, residual is not None,
                                           None if bent is None or by_output else copy_of(beta),
                                           None if bent is None or bent[1] else residual,
                                           target if by_output else None), total)
    if not trains:
        if keep:
            load_all(&job.mean, job.channels, <double*> cnp.PyArray_DATA(mean))
            load_all(&job.variance, job.channels, <double*> cnp.PyArray_DATA(variance))
        carry_out(&job, wide, threads, serial)
        return result
    if keep:
        job.first, job.second = <double*> cnp.PyArray_DATA(mean), <double*> cnp.PyArray_DATA(variance)
        if job.weighs:
            job.total = <double*> cnp.PyArray_DATA(total)
    if carry_out(&job, wide, threads, serial):
        return None
    if layer is not None and (not job.weighs or has_weight(&job)):
        layer.batches += 1
    return result


def backward(dy, x, axis, gamma, mean, variance, double epsilon, bint frozen, out, threads, Py_ssize_t serial, counting=None,
             bent=None, bint has_residual=False, beta=None, residual=None, y=None):
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
    counting : tuple, optional
        Where values do not all count alike; see `fastbn.kernels.run`.
    bent, has_residual, beta, residual, y
        Of the cache: the activation, whether there was a residual, and what the derivative is told from.

    Returns
    -------
    tuple or None
        dx, dgamma, dbeta, and dresidual if there was a residual.
    """
    cdef Job job
    cdef cnp.ndarray source, target, dgamma, dbeta
    cdef Py_ssize_t bytes
    cdef int number
    cdef bint fused = bent is not None or has_residual
    cdef object told_from = residual if y is None else y
    cdef object dresidual = None
    if fused and counting is not None:
        return None
    if not (is_plain(x) and kind_of(<cnp.ndarray> x) >= 0 and is_result(dy, <cnp.ndarray> x)):
        return None
    memset(&job, 0, sizeof(job))
    source = <cnp.ndarray> x
    if not set_shape(&job, source, axis):
        return None
    if not (bind(&job.gamma, gamma, job.channels) and bind(&job.mean, mean, job.channels)
            and bind(&job.variance, variance, job.channels)):
        return None
    bytes = cnp.PyArray_NBYTES(<cnp.ndarray> dy)
    in_order(&job, &job.u, <cnp.ndarray> dy)
    in_order(&job, &job.v, source)
    if told_from is not None:
        if not is_result(told_from, source):
            return None
        in_order(&job, &job.w, <cnp.ndarray> told_from)
    if bent is not None and not bind(&job.beta, beta, job.channels):
        return None
    if out is None:
        target = result_like(source)
        in_order(&job, &job.y, target)
        job.fresh = True
    else:
        if not is_result(out, source):
            return None
        target = <cnp.ndarray> out
        in_order(&job, &job.y, target)
        if not (cnp.PyArray_ISWRITEABLE(target) and same_or_apart(job.y.data, bytes, job.u.data, bytes)
                and same_or_apart(job.y.data, bytes, job.v.data, cnp.PyArray_NBYTES(source))
                and (told_from is None or same_or_apart(job.y.data, bytes, job.w.data, bytes))):
            return None
        if counting is not None and counting[0] is not None and not apart_from_array(job.y.data, bytes, counting[0]):
            return None
    if bent is not None:
        job.by_output = y is not None
        set_bend(&job.form, bent[0])
        set_gate(&job, told_from is not None and y is None)
    if has_residual:
        if bent is None:
            dresidual = cnp.PyArray_NewCopy(<cnp.ndarray> dy, cnp.NPY_CORDER)
        else:
            dresidual = empty_like(<cnp.ndarray> dy)
            in_order(&job, &job.kept, <cnp.ndarray> dresidual)
    bind_weights(&job, counting)
    job.operation = FROZEN if frozen else GRADIENT
    job.epsilon = epsilon
    number = cnp.NPY_FLOAT64 if cnp.PyArray_ITEMSIZE(source) == 8 else cnp.NPY_FLOAT32
    dgamma = <cnp.ndarray> cnp.PyArray_EMPTY(1, <cnp.npy_intp*> &job.channels, number, 0)
    dbeta = <cnp.ndarray> cnp.PyArray_EMPTY(1, <cnp.npy_intp*> &job.channels, number, 0)
    bind(&job.dgamma, dgamma, job.channels)
    bind(&job.dbeta, dbeta, job.channels)
    carry_out(&job, cnp.PyArray_ITEMSIZE(source) == 8, threads, serial)
    return (target, dgamma, dbeta, dresidual) if has_residual else (target, dgamma, dbeta)
