"""Where results go: into the caches, or past them."""
from cython cimport floating

from .caches cimport is_lean, is_roomy
from .job cimport NORMALIZE, TRAIN, Job, Operand, kind_of_results, native
from .strips cimport CLIPPED, SMOOTH

cdef enum:
    # Bytes of a result from which it is stored past the caches: a plain store would read every line before it writes it.
    # Where cores share a last level, the fewer arrays a pass reads, the larger the result for which that is worth more.
    # Measured, not asked of the system: a virtual machine reported 320 MB of last level cache.
    STREAM_INFERENCE = 9 << 22
    STREAM_TRAINING = 3 << 23
    STREAM_GRADIENT = 3 << 22
    # Roomy cores: of results that registers store, and of other gradients.
    STREAM_ROOMY = 1 << 23
    STREAM_ROOMY_GRADIENT = 1 << 24
    # Lean cores: what is left of such a last level beside the others that share it holds no more.
    STREAM_LEAN = 3 << 22
    STREAM_LEAN_GRADIENT = 1 << 23
    # All: of results that registers store by whole lines, and that are in no cache anyway.
    STREAM_BETWEEN = 1 << 21


cdef inline Py_ssize_t streamed_from(const Job* job, bint gathers) noexcept nogil:
    """Bytes of a result from which it is stored past the caches, gathered in tiles for that or not."""
    if job.trains and job.y.size >= 4 and not gathers:
        return STREAM_BETWEEN
    if is_roomy() and job.y.kind == kind_of_results(job) and not gathers:
        return STREAM_ROOMY
    if is_lean() and (job.y.size >= 4 or not gathers):
        return STREAM_LEAN if job.operation == NORMALIZE or job.operation == TRAIN else STREAM_LEAN_GRADIENT
    if job.operation == NORMALIZE:
        return STREAM_INFERENCE
    if job.operation == TRAIN:
        return STREAM_TRAINING
    return STREAM_ROOMY_GRADIENT if is_roomy() else STREAM_GRADIENT


cdef inline bint is_in_place(const Job* job) noexcept nogil:
    """Whether results take the place of an operand."""
    return job.y.data == job.u.data or job.y.data == job.v.data or job.y.data == job.w.data


cdef inline void place_results(Job* job, bint gathers) noexcept nogil:
    """Decide whether they are stored past the caches, and where dy is kept behind its gate, so that the derivative is found once.

    In place the lines of y are in a cache already. dy is kept where it goes anyway, or in dx where a store costs less than the
    derivative: in a dx that stays in the caches, in any on roomy and on lean cores, and for every smooth activation. Not where
    x is, which is still to be read, and not in 16 bits, which would round it, unless it is dy or 0.
    """
    job.streams = (job.applies and not is_in_place(job)
                   and job.outer * job.channels * job.inner * job.y.size >= streamed_from(job, gathers))
    job.exact.data = NULL
    if not job.gated:
        return
    if job.kept.data != NULL:
        if job.kept.size >= 4 or job.gate.bend == CLIPPED:
            job.exact = job.kept
    elif (job.y.data != NULL and job.y.data != job.v.data and (job.y.size >= 4 or job.gate.bend == CLIPPED)
            and (job.gate.bend == SMOOTH or is_roomy() or is_lean() or not job.streams)):
        job.exact = job.y
        job.streams = False  # its lines are in a cache


cdef inline bint wants_room(const Job* job, bint near) noexcept nogil:
    """Whether dy behind a smooth activation, which has no place to be kept in, is better kept apart than found twice.

    Near is what stays in a cache. As large as x, it must not be where dx is to need no memory of its own.
    """
    return (job.gated and job.reduces and job.applies and job.exact.data == NULL and job.gate.bend == SMOOTH
            and (near or not is_in_place(job)))


cdef inline Operand in_room(const Job* job, floating* data, Py_ssize_t channels) noexcept nogil:
    """So many channels as one stretch of memory, of which the first is there, in the type of arithmetic."""
    cdef Py_ssize_t size = sizeof(floating)
    return Operand(<char*> data, native(data), size, channels * job.inner * size, job.inner * size, size)
