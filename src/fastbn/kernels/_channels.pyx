"""Work per channel, of which there is little: the moving statistics and the gradients of the parameters."""

cimport numpy as cnp
import numpy as np

from ._plan cimport bind_parameter
from .channels cimport blend, blend_counted, load, put_gradients, store, variance_of
from .deviations cimport reciprocal_deviation, reciprocal_deviations
from .job cimport Parameter
from .moments cimport merge
from .weights cimport merge_weighted

cnp.import_array()


def put(pairs, counts=()):
    """Copy arrays into arrays of their shape and type, and set `batches` of layers: all of it, or nothing.

    One call, in which nothing can fail and no signal handler runs: those run between the steps of Python.

    Parameters
    ----------
    pairs : list of (target, value)
        Arrays.
    counts : sequence of (layer, number)
        What `batches` becomes.
    """
    for target, value in pairs:
        cnp.PyArray_CopyInto(<cnp.ndarray> target, <cnp.ndarray> value)
    for layer, number in counts:
        layer.batches = number


def update_moving(moving_mean, moving_variance, mean, variance, double divisor, double momentum):
    """moving = momentum * moving + (1 - momentum) * batch, in float64, in place.

    The batch variance is ``variance / divisor``.
    """
    cdef Parameter old_mean, old_variance, new_mean, new_variance
    bind_parameter(&old_mean, moving_mean)
    bind_parameter(&old_variance, moving_variance)
    bind_parameter(&new_mean, mean)
    bind_parameter(&new_variance, variance)
    blend(&old_mean, &old_variance, &new_mean, &new_variance, moving_mean.shape[0], divisor, momentum)


def update_moving_counted(moving_mean, moving_variance, mean, variance, double[::1] counts, double ddof, double momentum):
    """The same where counts differ: a channel without any keeps what it has.

    A count up to ddof leaves the batch variance as it is.
    """
    cdef Parameter old_mean, old_variance, new_mean, new_variance
    bind_parameter(&old_mean, moving_mean)
    bind_parameter(&old_variance, moving_variance)
    bind_parameter(&new_mean, mean)
    bind_parameter(&new_variance, variance)
    if counts.shape[0]:
        blend_counted(&old_mean, &old_variance, &new_mean, &new_variance, counts.shape[0], &counts[0], ddof, momentum)


def parameter_gradients(first, second, variance, double epsilon, dgamma, dbeta):
    """dbeta = sum(dy); dgamma = sum(dy * (x - mean)) / sqrt(variance + epsilon). first and second are contiguous."""
    cdef Parameter scale, shift, var
    cdef const double* sums = <double*> cnp.PyArray_DATA(<cnp.ndarray?> first)
    cdef const double* products = <double*> cnp.PyArray_DATA(<cnp.ndarray?> second)
    cdef double deviation, value
    cdef Py_ssize_t c
    bind_parameter(&var, variance)
    bind_parameter(&scale, dgamma)
    bind_parameter(&shift, dbeta)
    for c in range(dgamma.shape[0]):
        value = load(&var, c, 1)
        reciprocal_deviations(&value, epsilon, 1, not scale.wide, &deviation)
        put_gradients(&scale, &shift, c, 1, sums + c, products + c, &deviation)


def output_parameters(gamma, beta, variance, double epsilon):
    """What makes the gradient of a batch norm that of one whose input was y.

    With g = abs(gamma), s = sign(gamma) and y = beta + gamma * x_hat, the formula for dx and dgamma with y for x, beta
    for the mean, g^2 for the variance, epsilon 0 and gamma * r * g for gamma gives dx, and dgamma * s.

    Returns
    -------
    mean, variance, gamma, sign : ndarray of float64
        Those to put in, and the sign of every gamma.
    """
    cdef Parameter scale, shift, var
    cdef Py_ssize_t c
    cdef double g
    result = np.empty((4, variance.shape[0]))
    cdef double[:, ::1] rows = result
    bind_parameter(&scale, gamma)
    bind_parameter(&shift, beta)
    bind_parameter(&var, variance)
    for c in range(rows.shape[1]):
        g = load(&scale, c, 1)
        rows[0, c] = load(&shift, c, 0)
        rows[1, c] = g * g
        rows[2, c] = g * reciprocal_deviation(load(&var, c, 1), epsilon) * abs(g)
        rows[3, c] = -1 if g < 0 else 1
    return result


def variance(m2, double count):
    """m2 / count per channel, as a new array."""
    cdef Parameter source, target
    cdef Py_ssize_t c
    result = np.empty(m2.shape[0])
    bind_parameter(&source, m2)
    bind_parameter(&target, result)
    for c in range(m2.shape[0]):
        store(&target, c, load(&source, c, 0) / count)
    return result


def merge_moments(double count, mean, m2, double other_count, other_mean, other_m2):
    """Merge a part into another in place, by Chan's formula; all arrays contiguous float64, other_count > 0."""
    cdef double* a = <double*> cnp.PyArray_DATA(<cnp.ndarray?> mean)
    cdef double* b = <double*> cnp.PyArray_DATA(<cnp.ndarray?> m2)
    cdef double* c = <double*> cnp.PyArray_DATA(<cnp.ndarray?> other_mean)
    cdef double* d = <double*> cnp.PyArray_DATA(<cnp.ndarray?> other_m2)
    if count == 0:
        mean[...] = other_mean
        m2[...] = other_m2
    else:
        merge(count, a, b, other_count, c, d, mean.shape[0])


def merge_rows(rows):
    """Merge parts in their order, by Chan's formula; each row is count, means, m2.

    Returns
    -------
    ndarray of float64
        The same numbers of the whole.
    """
    cdef const double[:, ::1] parts = rows
    cdef Py_ssize_t channels = (parts.shape[1] - 1) // 2
    cdef Py_ssize_t r
    result = np.zeros(parts.shape[1])
    cdef double[::1] total = result
    cdef double* t = &total[0]
    with nogil:
        for r in range(parts.shape[0]):
            if parts[r, 0] == 0:
                continue
            if t[0] == 0:
                total[:] = parts[r]
                continue
            merge(t[0], t + 1, t + 1 + channels, parts[r, 0], &parts[r, 0] + 1, &parts[r, 0] + 1 + channels, channels)
            t[0] += parts[r, 0]
    return result


def add_rows(rows):
    """Add rows in their order."""
    cdef const double[:, ::1] parts = rows
    cdef Py_ssize_t r, i
    result = np.zeros(parts.shape[1])
    cdef double[::1] total = result
    with nogil:
        for r in range(parts.shape[0]):
            for i in range(parts.shape[1]):
                total[i] += parts[r, i]
    return result


def variance_counted(m2, double[::1] counts, double ddof, double without):
    """m2 / (count - ddof) per channel, m2 / count where that is not positive, and another number where there is none."""
    cdef Parameter source, target
    cdef Py_ssize_t c
    result = np.empty(m2.shape[0])
    bind_parameter(&source, m2)
    bind_parameter(&target, result)
    for c in range(counts.shape[0]):
        store(&target, c, variance_of(load(&source, c, 0), counts[c], ddof, without))
    return result


def merge_moments_counted(double[::1] counts, mean, m2, double[::1] other_counts, other_mean, other_m2):
    """Merge a part into another in place where counts differ; all arrays contiguous float64."""
    if counts.shape[0]:
        merge_weighted(&counts[0], <double*> cnp.PyArray_DATA(<cnp.ndarray?> mean),
                       <double*> cnp.PyArray_DATA(<cnp.ndarray?> m2), &other_counts[0],
                       <double*> cnp.PyArray_DATA(<cnp.ndarray?> other_mean),
                       <double*> cnp.PyArray_DATA(<cnp.ndarray?> other_m2), counts.shape[0])
